"""The accelerators that we know: what a device can do at best, from the vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from llada.registry import Registry


@dataclass(frozen=True)
class Accelerator:
    """One device."""

    bf16_flops: float
    """Dense bfloat16 FLOP/s."""
    memory_gib: float
    """Device memory in GiB."""
    bytes_per_second: float
    """Between that memory and the cores."""


ACCELERATORS: Registry[Accelerator] = Registry(
    "accelerator",
    {
        "a100": Accelerator(312e12, 80, 2.039e12),
        "h100": Accelerator(989e12, 80, 3.35e12),
        "h800": Accelerator(989e12, 80, 3.35e12),
        "h200": Accelerator(989e12, 141, 4.8e12),
        "b200": Accelerator(2250e12, 180, 8e12),
        "l40s": Accelerator(362e12, 48, 864e9),
        "mi300x": Accelerator(1307e12, 192, 5.3e12),
    },
)
"""By name. A new one is a row."""


def recognise(device_name: str) -> Accelerator | None:
    """The accelerator of a device by the name that its driver gives it ("NVIDIA H100 80GB HBM3"), or None."""
    return next((ACCELERATORS[name] for name in ACCELERATORS if name in device_name.lower()), None)
