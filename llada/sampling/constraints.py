"""Which tokens may stand at which positions of a text: `allowed` and `forbidden`, beside `fixed` what frames a reply.

Shape legend: N candidates, M of them, K pairs, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llada.errors import UserError
from llada.sampling.config import SamplingConfig

EVERYWHERE = "*"


def named_ids(config: SamplingConfig) -> dict[str, Tensor]:
    """{setting: the ids (K,) that it names}, of settings whose texts are spelled."""
    named: dict[str, list[Any]] = {"fixed": list((config.fixed or {}).values())}
    for name in ("allowed", "forbidden"):
        named[name] = [token for tokens in (getattr(config, name) or {}).values() for token in tokens]
    return {name: torch.tensor(ids, dtype=torch.int64) for name, ids in named.items()}


class Constraints:
    """What the settings say about single positions, as tables of ids."""

    def __init__(self, config: SamplingConfig, never_ids: Iterable[int], end_ids: Iterable[int]) -> None:
        """`never_ids` are written nowhere, `end_ids` not before the last position that something is said about.

        Raises UserError for a text in the place of an id, and for a position at which nothing is left.
        """
        allowed, forbidden = _ids("allowed", config.allowed), _ids("forbidden", config.forbidden)
        last = last_position(config)
        for position, ids in allowed.items():
            left = {*ids} - {*never_ids}
            if isinstance(position, int) and position < last:
                left -= {*end_ids}
            if not left:
                raise UserError(
                    f"sampling: allowed names nothing at position {position} that may stand there: the mask never may, an end of "
                    f"the text not before position {last} nor with logits_eos_inf"
                )
        self.allowed, self.forbidden = _Table(allowed), _Table(forbidden)
        self._always_forbidden = torch.tensor(forbidden.get(EVERYWHERE, []), dtype=torch.int64)

    @staticmethod
    def of(config: SamplingConfig, never_ids: Iterable[int], end_ids: Iterable[int]) -> Constraints | None:
        """None where the settings say nothing."""
        return Constraints(config, never_ids, end_ids) if config.allowed or config.forbidden else None

    def rule_out(self, logits: Tensor, which: Tensor, position: Tensor) -> None:
        """Set to −∞, in `logits` (N, V), what must not stand at the positions (M,) of the candidates `which` (M,)."""
        device = logits.device
        row, ids = self.allowed.pairs(position)
        at, ids = which[row].to(device), ids.to(device)
        kept = logits[at, ids]
        logits[which[self.allowed.has(position)].to(device)] = -torch.inf
        logits[at, ids] = kept
        row, ids = self.forbidden.pairs(position)
        logits[which[row].to(device), ids.to(device)] = -torch.inf
        if len(self._always_forbidden):
            logits[which[:, None].to(device), self._always_forbidden.to(device)] = -torch.inf


class _Table:
    """Lists of ids by position, one behind the other; those of EVERYWHERE stand where a position has none of its own."""

    def __init__(self, ids: Mapping[int | str, Sequence[int]]) -> None:
        own = {position: given for position, given in ids.items() if isinstance(position, int)}
        lists = [ids.get(EVERYWHERE, []), *own.values()]
        self.ids = torch.tensor([token for given in lists for token in given], dtype=torch.int64)
        self._count = torch.tensor([len(given) for given in lists])
        self._begin = self._count.cumsum(0) - self._count
        # Which list a position has; the last entry is for those behind.
        self._list = torch.zeros(max(own, default=-1) + 2, dtype=torch.int64)
        self._list[list(own)] = torch.arange(1, len(lists))

    def _list_of(self, position: Tensor) -> Tensor:
        place = torch.where(position < 0, len(self._list) - 1, position)
        return self._list[place.clamp(max=len(self._list) - 1)]

    def has(self, position: Tensor) -> Tensor:
        """(M,) bool: whether there are ids for the positions (M,)."""
        return self._count[self._list_of(position)] > 0

    def pairs(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """(K,) indices into the positions (M,), and (K,) the ids of each."""
        chosen = self._list_of(position)
        count = self._count[chosen]
        row = torch.arange(len(position)).repeat_interleave(count)
        place = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
        return row, self.ids[self._begin[chosen][row] + place]


def last_position(config: SamplingConfig) -> int:
    """The last one about which something definite is said: before it a text must not end. 0 if nothing is said."""
    said = [*(config.fixed or {}), *(config.allowed or {})]
    return max((int(position) for position in said if position != EVERYWHERE), default=0)


def _ids(name: str, given: Mapping[Any, Sequence[int | str]] | None) -> dict[int | str, list[int]]:
    ids: dict[int | str, list[int]] = {}
    for position, tokens in (given or {}).items():
        for token in tokens:
            if isinstance(token, str):
                raise UserError(
                    f"generate: {name} names the text {token!r} at position {position}, but a text has no ids without a "
                    "tokenizer: give token ids"
                )
        ids[position if position == EVERYWHERE else int(position)] = [int(token) for token in tokens]
    return ids
