"""What tests of several rooms measure with."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made under it has."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else [out]
        self.numbers = max([self.numbers, *(x.numel() for x in made if isinstance(x, Tensor))])
        return out


@pytest.fixture
def largest() -> Callable[[], Largest]:
    """Makes a context whose `numbers` are afterwards those of the largest tensor that was made in it."""
    return Largest
