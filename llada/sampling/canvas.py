"""The canvas: tokens being denoised, cut into blocks, and how far each row has come.

A row works on one block at a time, the first that holds a mask; blocks are counted from where the text starts, and masks
in the prompt belong to the first. The steps are shared out among the blocks that hold masks, in each row for itself, so
that a row is denoised alike in any company.

Shape legend: B rows, L columns, K blocks.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from llada.diffusion.noise import stream_key
from llada.errors import UserError
from llada.model.transformer import row_positions
from llada.sampling.config import SamplingConfig
from llada.sampling.rules import Rule, find_rule
from llada.settings import shorten


class Canvas:
    """Rows that are denoised with the same settings. `sampler.plan` and `sampler.commit` change it in place."""

    def __init__(
        self,
        tokens: Tensor,
        config: SamplingConfig,
        *,
        mask_id: int,
        start: int,
        eos_id: int | Sequence[int] | None = None,
        never_ids: Sequence[int] = (),
        unsure_ids: Sequence[int] = (),
        attention_mask: Tensor | None = None,
        seed: int | Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            tokens: (B, L) int64 with the masks in place; copied.
            start: the first column of the text: blocks begin there, and only from there on EOS ends a row. A row whose
                padding reaches further begins behind it.
            eos_id: once this id (one of these) is committed, the masks right of it become EOS (the first of these) and are
                never denoised; what was committed there before becomes EOS at the end. None: no end.
            never_ids: never written, beside the mask.
            unsure_ids: of no confidence.
            attention_mask: (B, L), 0 on padding, which stands at the ends of a row.
            seed: an int seeds row i with seed + i, a sequence gives each row its own. None is random, or 0 where
                `temperature` is 0.

        Raises:
            UserError: the padding is the mask token, which would be filled, or stands within a row; EOS is the mask token;
                another number of seeds than rows.
        """
        self.config, self.mask_id, self.start = config, mask_id, start
        self.rule: Rule = find_rule(config)
        self.temperature = self.rule.temperature if config.temperature is None else config.temperature
        self.tokens = tokens.clone()
        device = tokens.device
        self.end_ids = torch.tensor(as_ids(eos_id), dtype=torch.int64, device=device)
        if mask_id in self.end_ids.tolist():
            raise UserError(f"sampling: {mask_id} cannot be both the mask token and the end of a text")
        self.never_ids = torch.tensor([mask_id, *never_ids], dtype=torch.int64, device=device)
        self.unsure_ids = torch.tensor(list(unsure_ids), dtype=torch.int64, device=device)
        # Behind this position a text may end: what is fixed must not be cut off.
        self.open_until = max(config.fixed, default=0) if config.fixed else 0
        masks = tokens == mask_id
        attended = None if attention_mask is None else check_padding(attention_mask, tokens)
        if attended is not None and bool(attended.all()):
            attended = None
        if attended is not None and bool((masks & ~attended).any()):
            raise UserError(
                f"sampling: the padding must not be the mask token {mask_id}, which would be filled"
            )
        self.attention_mask = None if attended is None else attended.long()
        self.prompt = ~masks  # (B, L) bool: given tokens and padding, what classifier-free guidance hides
        B, L = tokens.shape
        # (B, L) counted from where the row's text starts: the same whatever padding stands before it.
        self.position = (torch.arange(L, device=device) - start).expand(B, L)
        if attended is not None:
            self.position = torch.minimum(self.position, row_positions(attended))
        # A block longer than the row is the row; Python's integers may be wider than the tensor's.
        self.block_of = self.position.clamp(min=0) // min(config.block_length, max(1, L))  # (B, L)
        masks_in = torch.zeros(
            B, int(self.block_of.max()) + 1 if B * L else 0, dtype=torch.int64, device=device
        )
        masks_in.scatter_add_(1, self.block_of, masks.long())
        self.steps_of = share_steps(masks_in, config.steps)  # (B, K)
        self.steps = self.steps_of.sum(1)  # (B,)
        # (B, K): the blocks with masks from this one on, each of which needs a forward.
        self.blocks_left = (masks_in > 0).long().flip(1).cumsum(1).flip(1)
        if seed is None and config.temperature == 0:
            seed = 0
        self.seed_keys = torch.tensor(_seed_keys(seed, B), dtype=torch.int64, device=device)  # (B,)
        # (B, L): at which step of its block a position is due, where the rule decides that beforehand.
        self.due = self.rule.due_steps(self) if self.rule.due_steps else None

        self.block = torch.full((B,), -1, device=device)  # the one that each row works on
        self.block_masks = torch.zeros_like(self.block)  # its masks when the row came to it
        self.step = torch.zeros_like(self.block)  # forwards of the row in it
        self.forwards = torch.zeros_like(self.block)  # of the row so far: what its noise is drawn for
        self.reveal_step = torch.full_like(tokens, -1)  # (B, L): forward of the canvas that committed a token
        self.nfe = 0  # forwards so far; a batch counts once, guidance's doubled batch too
        self.token_forwards = 0  # tokens fed to the network so far, guidance's copies included

    def first_end(self, ends: Tensor) -> Tensor:
        """(B, 1): each row's first column of the text among `ends` (B, L) bool; L where there is none."""
        L = ends.shape[1]
        columns = torch.arange(L, device=ends.device)
        return torch.where(ends & (columns >= self.start), columns, L).amin(1, keepdim=True)

    def close_texts(self) -> None:
        """What was generated behind the first EOS of a text becomes EOS, whichever came first."""
        if not len(self.end_ids) or not self.tokens.shape[1]:
            return
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        behind = (columns > self.first_end(torch.isin(self.tokens, self.end_ids))) & ~self.prompt
        self.tokens = torch.where(behind, self.end_ids[0], self.tokens)
        self.reveal_step = self.reveal_step.masked_fill(behind, -1)


def share_steps(masks_in: Tensor, steps: int | None) -> Tensor:
    """(B, K) steps of each block from its masks (B, K): as equal as they can be among a row's blocks that hold masks,
    the first ones longer, at least one. None gives a block as many as it holds masks."""
    if steps is None:
        return masks_in
    has_masks = masks_in > 0
    blocks = has_masks.sum(1, keepdim=True).clamp(min=1)
    place = has_masks.cumsum(1) - 1
    return (steps // blocks + (place < steps % blocks)).clamp(min=1) * has_masks


def prompt_canvas(
    prompt: Tensor | Sequence[Sequence[int]],
    config: SamplingConfig,
    *,
    mask_id: int,
    eos_id: int | Sequence[int] | None = None,
    never_ids: Sequence[int] = (),
    unsure_ids: Sequence[int] = (),
    attention_mask: Tensor | None = None,
    suffix: Sequence[int] = (),
    seed: int | Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> Canvas:
    """Prompt + `config.gen_length` masks, `config.fixed` among them, + suffix.

    Args:
        prompt: (B, P) integers, or lists of ids of any lengths, which are left-padded here.
        attention_mask: (B, P), 0 on the padding of a tensor prompt. Padding on the right of a prompt would stand within
            the text and change the rotary distances: such rows are moved to the right.

    The other arguments, and what raises UserError, are those of `Canvas`.
    """
    if isinstance(prompt, Tensor):
        rows = as_rows(prompt)
        if attention_mask is not None:
            rows, attention_mask = _move_right(rows, check_padding(attention_mask.to(rows.device), rows))
    elif attention_mask is not None:
        raise UserError("generate: attention_mask goes with a tensor prompt; lists are padded here")
    else:
        rows, attention_mask = left_pad(prompt, pad_id=int(mask_id == 0))  # any id but the mask
    rows = rows.to(device or rows.device)
    B, P = rows.shape
    text = torch.full((config.gen_length,), mask_id, dtype=torch.int64)
    for position, token in (config.fixed or {}).items():
        if isinstance(token, str):
            raise UserError(
                f"generate: fixed puts the text {token!r} at position {position}, but a text has no ids without a "
                "tokenizer: give token ids"
            )
        if token == mask_id:
            raise UserError(f"generate: fixed puts the mask token {mask_id} at position {position}")
        text[position] = token
    is_end = torch.isin(text, torch.tensor(as_ids(eos_id), dtype=torch.int64))
    if config.fixed and bool((is_end.cumsum(0).bool() & ~is_end & (text != mask_id)).any()):
        raise UserError("generate: fixed puts tokens behind the end of the text that it puts before them")
    behind = torch.cat([text, torch.tensor(list(suffix), dtype=torch.int64)]).to(rows.device)
    if attention_mask is not None:
        attention_mask = torch.nn.functional.pad(attention_mask.to(rows.device), (0, len(behind)), value=1)
    return Canvas(
        torch.cat([rows, behind.expand(B, -1)], dim=1),
        config,
        mask_id=mask_id,
        start=P,
        eos_id=eos_id,
        never_ids=never_ids,
        unsure_ids=unsure_ids,
        attention_mask=attention_mask,
        seed=seed,
    )


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


def _move_right(rows: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
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


def _seed_keys(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """The noise key of each row."""
    if seed is None:
        return [int(key) for key in torch.randint(2**62, (rows,))]
    seeds = row_seeds(seed, rows)
    if len(seeds) != rows:
        raise UserError(f"sampling: {len(seeds)} seeds for {rows} rows; give one for each row")
    return [stream_key(seed, "sampling") for seed in seeds]
