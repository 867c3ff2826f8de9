"""torch.compile, for as many kinds of inputs as there are."""

from __future__ import annotations

import inspect
from typing import Any

import torch

# Of training and validation, whole and cut rows, first and last micro-batches, with and without padding: a dozen of a block,
# and of FlexAttention's mask.
VARIANTS = 64


def for_many_kinds() -> dict[str, Any]:
    """Options of torch.compile that let it compile a function for so many kinds of inputs.

    Beyond torch's own limit of 8 a function runs as it is written, which FlexAttention does in memory of the rows' length
    squared; and one that is compiled with `fullgraph` raises.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": VARIANTS}
    from torch._dynamo import config  # of torch before 2.13

    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    return {}
