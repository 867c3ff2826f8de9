"""What callers give: token ids, padding and seeds, checked, in one form.

Shape legend: B rows, L columns, P prompt columns.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from llada.diffusion.noise import stream_key
from llada.errors import UserError
from llada.settings import shorten


def as_rows(tokens: Tensor) -> Tensor:
    """(B, L) int64 of one row (L,) or several. Raises UserError for what holds no ids."""
    if tokens.dim() not in (1, 2) or tokens.is_floating_point() or tokens.is_complex():
        raise UserError(
            f"token ids are integers of shape (B, L) or (L,), not {tokens.dtype} of shape {tuple(tokens.shape)}"
        )
    return (tokens if tokens.dim() == 2 else tokens[None]).long()


def as_ids(ids: int | Sequence[int] | None) -> list[int]:
    """One id, several or none, as a list."""
    if ids is None:
        return []
    try:
        return [operator.index(ids)]  # type: ignore[arg-type]
    except TypeError:
        return [operator.index(i) for i in ids]  # type: ignore[union-attr]


def check_padding(attention_mask: Tensor, tokens: Tensor) -> Tensor:
    """The mask (B, L) of `tokens` (B, L) as bool. Raises UserError for another shape, other values than 0 and 1, and
    padding between the tokens of a row."""
    mask = attention_mask[None] if attention_mask.dim() == 1 else attention_mask
    if mask.shape != tokens.shape:
        raise UserError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, the tokens have {tuple(tokens.shape)}"
        )
    attended = mask != 0
    if bool((attended & (mask != 1)).any()):
        raise UserError("attention_mask must hold 1 on tokens and 0 on padding, and nothing else")
    beginnings = torch.nn.functional.pad(attended.long(), (1, 0)).diff(dim=1) > 0
    if len(broken := (beginnings.sum(1) > 1).nonzero()):
        raise UserError(
            f"attention_mask: row {int(broken[0])} has padding between its tokens; it must stand before or behind them"
        )
    return attended


def move_right(rows: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (B, P) and their mask with the padding behind a row's tokens put before them."""
    P = rows.shape[1]
    # (B, 1): the padding behind the tokens; in a row of nothing but padding, all of it.
    behind = (attended.flip(1).long().cumsum(1) == 0).sum(1, keepdim=True)
    source = (torch.arange(P, device=rows.device) - behind) % max(1, P)
    return rows.gather(1, source), attended.gather(1, source).long()


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(ids (B, P) int64 with `pad_id` on the left, attention mask (B, P), 0 on the padding)."""
    try:
        lists = [[operator.index(token) for token in row] for row in rows]
        width = max(map(len, lists), default=0)
        ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in lists], dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(
            f"prompts are lists of token ids, one list a row, not {shorten(rows)} ({error})"
        ) from None
    attended = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in lists], dtype=torch.int64)
    return ids.reshape(len(lists), width), attended.reshape(len(lists), width)


def row_seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    """The seed of each row: seed + row, or those of the sequence."""
    try:
        if isinstance(seed, Iterable):
            return [operator.index(row_seed) for row_seed in seed]
        return [operator.index(seed) + row for row in range(rows)]
    except TypeError:
        raise UserError(
            f"sampling: a seed is an integer, or a list of one for each row, not {shorten(seed)}"
        ) from None


def seed_keys(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """The noise key of each row; a random one without a seed. Raises UserError for another number of seeds than rows."""
    if seed is None:
        return [int(key) for key in torch.randint(2**62, (rows,))]
    seeds = row_seeds(seed, rows)
    if len(seeds) != rows:
        raise UserError(f"sampling: {len(seeds)} seeds for {rows} rows; give one for each row")
    return [stream_key(seed, "sampling") for seed in seeds]
