"""What the tests of the scripts share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def script(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The script that the test file is named after; its parts stand beside it."""
    sys.path.insert(0, str(HERE))
    yield importlib.import_module(Path(request.path).stem.removeprefix("test_"))
    sys.path.remove(str(HERE))
