"""Price lists: a small file of the user's, or the default one. Every amount of dollars says which list it is from.

name: our contract                 # a price list (YAML or JSON)
date: 2026-11-01
gpu_hour: {h100: [2.1, 2.4]}       # dollars of one GPU for an hour, from the lowest to the highest
machines: {node_hour: 2.9}         # of preparation, and the object store: llada/data/report/cost.py, Prices
"""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass, field, fields

from llada.data.report.cost import Prices
from llada.errors import UserError
from llada.hardware import ACCELERATORS
from llada.settings import from_dict, load_yaml, require


@dataclass(frozen=True)
class Dollars:
    """An amount, from the list's lowest price to its highest."""

    low: float
    high: float
    prices: str
    """Name and date of the list."""

    def __str__(self) -> str:
        amounts = dict.fromkeys((_amount(self.low), _amount(self.high)))
        return f"${' to '.join(amounts)} ({self.prices})"

    def __add__(self, other: Dollars) -> Dollars:
        return Dollars(self.low + other.low, self.high + other.high, self.prices)


def _amount(dollars: float) -> str:
    return f"{dollars:,.0f}" if dollars >= 100 else f"{dollars:,.2f}"


@dataclass(frozen=True)
class PriceList:
    """What things cost, in dollars, on a day."""

    name: str
    date: str
    """ISO 8601: prices change."""
    gpu_hour: dict[str, tuple[float, float]] = field(default_factory=dict)
    """{GPU of llada/hardware.py: (lowest, highest) price of one for an hour}."""
    machines: Prices = Prices()
    """Of the nodes that prepare, and of the object store."""

    def __post_init__(self) -> None:
        try:
            datetime.date.fromisoformat(self.date)
        except ValueError:
            raise UserError(
                f"price list {self.name}: date must be like 2026-05-31, not {self.date!r}"
            ) from None
        for gpu, (low, high) in self.gpu_hour.items():
            ACCELERATORS.find(gpu)
            require(
                0 < low <= high < math.inf,
                f"price list {self.name}: gpu_hour.{gpu} must be [lowest, highest] above 0, not [{low}, {high}]",
            )
        for entry in fields(self.machines):
            price = getattr(self.machines, entry.name)
            require(
                0 <= price < math.inf,
                f"price list {self.name}: machines.{entry.name} must be at least 0, not {price}",
            )

    @property
    def label(self) -> str:
        return f"{self.name}, {self.date}"

    def gpu_hours(self, hours: tuple[float, float], gpu: str) -> Dollars | None:
        """What (fewest, most) hours of one GPU cost; None where the list has no price for it."""
        if gpu not in self.gpu_hour:
            return None
        low, high = self.gpu_hour[gpu]
        return Dollars(hours[0] * low, hours[1] * high, self.label)

    def dollars(self, low: float, high: float | None = None) -> Dollars:
        """An amount that was computed from this list's prices."""
        return Dollars(low, low if high is None else high, self.label)


DEFAULT = PriceList(
    name="default",
    date="2026-05-31",
    gpu_hour={
        "a100": (0.80, 3.00),
        "h100": (1.99, 5.00),
        "h200": (2.50, 7.00),
        "h800": (2.00, 2.00),
    },
)
"""On demand, from small providers to large clouds, in May 2026 (mercatus-ai.com/blog/cloud-gpu-pricing); H800: what DeepSeek-V3's
report reckons with (arXiv 2412.19437, Table 1). Machines and store: AWS us-east-1 (`Prices`)."""


def load_prices(path: str | None) -> PriceList:
    """The list at any fsspec URL; None: the default. Raises UserError naming the file and what of it is wrong."""
    if path is None:
        return DEFAULT
    values = load_yaml(path, "price list")
    if "date" in values:  # YAML makes a date of an unquoted one
        values["date"] = str(values["date"])
    return from_dict(PriceList, values, f"{path}: ")
