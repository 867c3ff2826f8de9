"""The table of accelerators, and devices recognised by what their driver calls them."""

import pytest

from llada.errors import UserError
from llada.hardware import ACCELERATORS, recognise


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("AMD Instinct MI300X OAM", "mi300x"),
    ],
)
def test_drivers_names_are_recognised(device: str, name: str) -> None:
    assert recognise(device) is ACCELERATORS[name]


def test_others_are_not() -> None:
    assert recognise("NVIDIA GeForce RTX 4090") is None
    with pytest.raises(UserError, match="did you mean 'h200'"):
        ACCELERATORS.find("h20")
