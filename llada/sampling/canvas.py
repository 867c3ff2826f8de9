"""The canvas: tokens being denoised, cut into blocks, and how far each row has come.

A row works on one block at a time, the first that holds a mask. Blocks are counted from where the text starts, and
masks in the prompt belong to the first. A block-causal network's own blocks are those of the canvas, counted from a
row's first token: the end of the prompt shares the block that the text begins in. The steps are shared out among the
blocks that hold masks.

Every row has settings, a cache and progress of its own, so that it is denoised alike in any company: rows of other
lengths and with other settings may join it (`Canvas.join`) and leave it (`Canvas.take`). Padding stands at the ends of
a row, is never fed to a network of ours, and neither is what stands behind an end that is certain (`Canvas.shorten`).

Shape legend: B rows, L columns, K blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from llada.errors import UserError
from llada.sampling import length
from llada.sampling.blocks import check_network_block, share_steps
from llada.sampling.cache import RowCache
from llada.sampling.coins import NEVER
from llada.sampling.config import SamplingConfig, check_window
from llada.sampling.constraints import Constraints, last_position
from llada.sampling.inputs import as_ids, as_rows, check_padding, left_pad, move_right, seed_keys
from llada.sampling.rules import find_rule, temperature_of
from llada.sampling.slots import Slots


class Step(NamedTuple):
    """What a forward is wanted for."""

    rows: Tensor  # (b,) the canvas' rows at work; finished ones are not run
    where: Tensor  # (b, L) bool: the N positions that want logits
    candidates: Tensor | None = None  # (b, L) bool: those that may be committed; None: all

    def of(self, places: Tensor) -> Step:
        """Some of its rows."""
        candidates = None if self.candidates is None else self.candidates[places]
        return Step(self.rows[places], self.where[places], candidates)


class Uses(NamedTuple):
    """Is there a row that …: what every step asks, and what does not change as long as the rows are these."""

    temperature: bool  # draws
    strata: bool  # draws with spread numbers
    unsure_ids: bool  # gives some ids no confidence
    open_until: bool  # holds its end back
    dues: bool  # decides beforehand what is unmasked when
    growth: bool  # may become longer
    committed: bool  # weighs what was committed
    remasking: bool  # makes masks of tokens
    trace: bool  # keeps confidences
    forced: bool  # is told what it writes


class Canvas:
    """Rows on their way, each with settings of its own. `sampler.plan` and `sampler.commit` change it in place.

    Every attribute has a row for each text; all tensors are on the CPU, whatever the network runs on.
    """

    # What a row has one of for each column, block or id, with what stands where another row has more of them.
    _BY_COLUMN: ClassVar[dict[str, float]] = {
        "tokens": 0,
        "prompt": 1,
        "attended": 0,
        "position": 0,
        "block_of": 0,
        "reveal_step": -1,
        "confidence": torch.nan,
        "top_of": -1,
        "forced": -1,
        "due": 0,
        "again": NEVER,
    }
    _BY_BLOCK: ClassVar[dict[str, int]] = {"steps_of": 0, "blocks_left": 0}
    _BY_KNOB: ClassVar[dict[str, int]] = {"knobs": 0}
    _BY_ID: ClassVar[tuple[str, ...]] = ("end_ids", "never_ids", "unsure_ids")
    _BY_ROW: ClassVar[tuple[str, ...]] = (
        "start",
        "first",
        "stop",
        "limit",
        "growth",
        "length_numbers",
        "steps",
        "seed_keys",
        "open_until",
        "temperature",
        "cfg_scale",
        "top_k",
        "top_p",
        "min_p",
        "stratified",
        "weighs_committed",
        "is_traced",
        "num_top",
        "block",
        "block_masks",
        "block_begin",
        "block_end",
        "step",
        "forwards",
        "token_forwards",
    )
    _LISTS: ClassVar[tuple[str, ...]] = ("configs", "rules", "caches", "constraints", "slots", "tops")

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
        network_block: int | None = None,
        is_traced: bool = False,
        num_top: int = 0,
        forced: Sequence[int] = (),
        slots: Slots | None = None,
    ) -> None:
        """Rows with the same settings; `join` puts others beside them.

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
            network_block: of a block-causal network the length of its blocks (`predict.network_block`).
            is_traced: how likely the model calls each token that is committed is kept (trace.py).
            num_top: and so many of the likeliest tokens in its place.
            forced: what the text's masks become in any case, an id for each of its first positions.
            slots: stretches of the text that hold one of several patterns.

        Raises:
            UserError: settings that mean nothing to a block-causal network; the padding is the mask token, which would be
                filled, or stands within a row; EOS is the mask token; `suffix_window` would hide what is given behind
                masks; another number of seeds than rows.
        """
        self.mask_id, self.device = mask_id, tokens.device  # where a plain function wants its tokens
        check_network_block(config, network_block)
        self.network_block = network_block
        tokens = self.tokens = tokens.to("cpu", torch.int64, copy=True)  # (B, L)
        B, L = tokens.shape
        if mask_id in as_ids(eos_id):
            raise UserError(f"sampling: {mask_id} cannot be both the mask token and the end of a text")
        masks = tokens == mask_id
        self.attended = torch.ones_like(masks)  # (B, L) bool: what is no padding
        if attention_mask is not None:
            self.attended = check_padding(attention_mask.cpu(), tokens)
        if bool((masks & ~self.attended).any()):
            raise UserError(
                f"sampling: the padding must not be the mask token {mask_id}, which would be filled"
            )
        given_behind = (~masks & self.attended).flip(1).cummax(1)[0].flip(1) if L else masks
        check_window(config, is_given_behind=bool((masks & given_behind).any()))
        self.prompt = ~masks  # (B, L) bool: given tokens and padding, what classifier-free guidance hides

        def each(value: float, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full((B,), value, dtype=dtype)

        rule = find_rule(config)
        self.configs, self.rules = [config] * B, [rule] * B
        self.caches = [RowCache() for _ in range(B)]
        self.start = each(start)
        self.first, self.stop = attended_span(self.attended)  # (B,): the columns of the row's tokens
        self.limit = self.stop.clone()  # (B,): what `stop` may grow to (length.py)
        self.growth = each(length.SETTLED)
        self.length_numbers = (
            torch.tensor(length.numbers_of(config), dtype=torch.float64).expand(B, -1).clone()
        )
        # (B, L) counted from where the row's text starts: the same whatever padding stands before it.
        columns = torch.arange(L)
        self.position = torch.minimum(columns - start, columns - self.first[:, None])
        from_start = self.position if network_block is None else columns - self.first[:, None]
        # A block longer than the row is the row; Python's integers may be wider than the tensor's.
        self.block_of = from_start.clamp(min=0) // min(config.block_length, max(1, L))  # (B, L)
        masks_in = torch.zeros(B, int(self.block_of.max()) + 1 if B * L else 0, dtype=torch.int64)
        masks_in.scatter_add_(1, self.block_of, masks.long())
        self.steps_of = share_steps(masks_in, config.steps)  # (B, K)
        # (B, K): the blocks with masks from this one on, each of which needs a forward.
        self.blocks_left = (masks_in > 0).long().flip(1).cumsum(1).flip(1)
        self.steps = self.steps_of.sum(1)  # (B,)
        if seed is None and config.temperature == 0:
            seed = 0
        self.seed_keys = torch.tensor(seed_keys(seed, B), dtype=torch.int64)  # (B,)

        self.end_ids = _id_table(as_ids(eos_id), B, -1)  # (B, n)
        self.never_ids = _id_table([mask_id, *never_ids], B, mask_id)
        self.unsure_ids = _id_table(unsure_ids, B, mask_id)  # the mask has no confidence in any case
        # Behind this position a text may end: what is fixed, or to be chosen from a few, must not be cut off.
        self.open_until = each(last_position(config))
        self.constraints = [Constraints.of(config, [mask_id, *never_ids], as_ids(eos_id))] * B
        self.slots = [slots] * B
        self.temperature = each(temperature_of(config), torch.float64)
        self.top_k = each(max(0, config.top_k))
        self.top_p = each(config.top_p, torch.float64)
        self.min_p = each(config.min_p, torch.float64)
        self.stratified = each(config.stratified, torch.bool)
        self.cfg_scale = each(config.cfg_scale, torch.float64)
        # (B, n): the numbers that the rule reads.
        numbers = [getattr(config, name) for name in (rule.knob, *rule.beside) if name]
        self.knobs = torch.tensor(numbers or [0.0], dtype=torch.float64).expand(B, -1).clone()
        self.weighs_committed = each(rule.weighs_committed, torch.bool)
        # (B, L): at which step of its block a position is due, where the rule decides that beforehand; and after which one a
        # token that was committed becomes a mask again.
        self.due = rule.due_steps(self) if rule.due_steps and B else torch.zeros_like(tokens)
        self.again = torch.full_like(tokens, NEVER)

        self.block = each(-1)  # the one that each row works on
        self.block_masks = each(0)  # its masks when the row came to it
        self.block_begin, self.block_end = each(0), each(0)  # its columns
        self.step = each(0)  # forwards of the row in it
        self.forwards = each(0)  # of the row so far: what its noise is drawn for
        self.token_forwards = each(0)  # tokens fed to the network so far, guidance's copies included
        self.reveal_step = torch.full_like(tokens, -1)  # (B, L): forward of the row that committed a token
        # (B, L) of a traced row the model's probability of a token, among what may stand there, when it was committed.
        self.confidence = torch.full(tokens.shape, torch.nan, dtype=torch.float64)
        self.is_traced, self.num_top = each(is_traced, torch.bool), each(num_top)
        self.forced = torch.full_like(
            tokens, -1
        )  # (B, L): what a mask becomes in any case; -1: what is drawn
        self.forced[:, start : start + len(forced)] = torch.tensor(forced, dtype=torch.int64)
        # (B, L): where among `tops` stands what was likeliest when a token was committed.
        self.top_of = torch.full_like(tokens, -1)
        self.tops: list[list[tuple[tuple[int, float], ...]]] = [[] for _ in range(B)]
        self.nfe = 0  # forwards so far; a batch counts once, guidance's doubled batch too
        length.hold_back(self)

    @staticmethod
    def join(canvases: Sequence[Canvas]) -> Canvas:
        """One canvas of the rows of all, in order; rows that were shorter have padding behind them. The others must not be
        used any more."""
        first = canvases[0]
        joined = Canvas.__new__(Canvas)
        joined.mask_id, joined.device = first.mask_id, first.device
        joined.network_block = first.network_block
        joined.nfe = max(canvas.nfe for canvas in canvases)
        fills = {
            **Canvas._BY_COLUMN,
            **Canvas._BY_BLOCK,
            **Canvas._BY_KNOB,
            **dict.fromkeys(Canvas._BY_ID, first.mask_id),
            "tokens": int(first.mask_id == 0),  # any id but the mask
            "end_ids": -1,
        }
        for name, fill in fills.items():
            setattr(joined, name, _stack([getattr(canvas, name) for canvas in canvases], fill))
        for name in Canvas._BY_ROW:
            setattr(joined, name, torch.cat([getattr(canvas, name) for canvas in canvases]))
        for name in Canvas._LISTS:
            setattr(joined, name, [value for canvas in canvases for value in getattr(canvas, name)])
        return joined

    def take(self, rows: Sequence[int]) -> Canvas:
        """A canvas of these rows alone, as wide as they need."""
        taken = Canvas.__new__(Canvas)
        taken.mask_id, taken.device, taken.nfe = self.mask_id, self.device, self.nfe
        taken.network_block = self.network_block
        index = torch.tensor(rows, dtype=torch.int64)
        for name in (
            *Canvas._BY_COLUMN,
            *Canvas._BY_BLOCK,
            *Canvas._BY_KNOB,
            *Canvas._BY_ID,
            *Canvas._BY_ROW,
        ):
            setattr(taken, name, getattr(self, name)[index])
        width = int(attended_span(taken.attended)[1].max()) if rows else 0
        for name in Canvas._BY_COLUMN:
            setattr(taken, name, getattr(taken, name)[:, :width])
        for name in Canvas._LISTS:
            values = getattr(self, name)
            setattr(taken, name, [values[row] for row in rows])
        return taken

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def uses(self) -> Uses:
        return Uses(
            temperature=bool(self.temperature.any()),
            strata=bool(self.stratified.any()),
            unsure_ids=bool((self.unsure_ids != self.mask_id).any()),
            open_until=bool(self.open_until.any()),
            dues=any(rule.due_steps for rule in self.rules),
            growth=bool((self.growth != length.SETTLED).any()),
            committed=bool(self.weighs_committed.any()),
            remasking=any(rule.may_remask for rule in self.rules),
            trace=bool(self.is_traced.any()),
            forced=bool((self.forced >= 0).any()),
        )

    def is_end(self, tokens: Tensor) -> Tensor:
        """(B, L) bool: which of these are one of their row's ends."""
        return (tokens[:, :, None] == self.end_ids[:, None, :]).any(-1)

    def first_end(self, ends: Tensor) -> Tensor:
        """(B, 1): each row's first column of the text among `ends` (B, L) bool; L where there is none."""
        L = ends.shape[1]
        columns = torch.arange(L)
        return torch.where(ends & (columns >= self.start[:, None]), columns, L).amin(1, keepdim=True)

    def final_until(self) -> list[int]:
        """For each row: the column before which its tokens stay as they are, masks aside."""
        width = self.tokens.shape[1]
        if not self.uses.remasking:
            return [width] * len(self)
        is_open = ((self.tokens == self.mask_id) & self.attended | (self.again < NEVER)).any(1).tolist()
        begins = self.block_begin.tolist()
        return [
            begin if rule.may_remask and at_work else width
            for rule, at_work, begin in zip(self.rules, is_open, begins, strict=True)
        ]

    def close_texts(self) -> None:
        """What was generated behind the first EOS of a text becomes EOS, whichever came first."""
        if not self.tokens.shape[1]:
            return
        columns = torch.arange(self.tokens.shape[1])
        behind = (columns > self.first_end(self.is_end(self.tokens))) & ~self.prompt
        self.tokens = torch.where(behind, self.end_ids[:, :1], self.tokens)
        self.reveal_step = self.reveal_step.masked_fill(behind, -1)
        self.confidence = self.confidence.masked_fill(behind, torch.nan)

    def shorten(self, rows: Tensor, last: Tensor) -> None:
        """What stands behind the columns `last` (b,) of these rows is settled: it is not fed to the network any more, but
        where something given stands there."""
        columns = torch.arange(self.tokens.shape[1])
        behind = (columns > last[:, None]) & self.attended[rows]
        is_given = (behind & self.prompt[rows]).any(1)
        self.stop[rows] = torch.where(is_given, self.stop[rows], torch.minimum(self.stop[rows], last + 1))


def attended_span(attended: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) and (B,): the first column of what is attended in (B, L), and the one behind the last."""
    if not attended.shape[1]:
        return torch.zeros(len(attended), dtype=torch.int64), torch.zeros(len(attended), dtype=torch.int64)
    marks = attended.long()
    first = marks.argmax(1)
    return first, first + marks.sum(1)


def _id_table(ids: Sequence[int], rows: int, fill: int) -> Tensor:
    """(rows, n) int64: the same ids for every row, `fill` where there is none."""
    return torch.tensor(list(ids) or [fill], dtype=torch.int64).expand(rows, -1).clone()


def _stack(tables: Sequence[Tensor], fill: int) -> Tensor:
    """Tables (b, n) of any widths n, one below the other, `fill` behind the narrower ones."""
    width = max(table.shape[1] for table in tables)
    pad = torch.nn.functional.pad
    return torch.cat([pad(table, (0, width - table.shape[1]), value=fill) for table in tables])


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
    network_block: int | None = None,
    is_traced: bool = False,
    num_top: int = 0,
    forced: Sequence[int] = (),
    slots: Slots | None = None,
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
            rows, attention_mask = move_right(rows, check_padding(attention_mask.to(rows.device), rows))
    elif attention_mask is not None:
        raise UserError("generate: attention_mask goes with a tensor prompt; lists are padded here")
    else:
        rows, attention_mask = left_pad(prompt, pad_id=int(mask_id == 0))  # any id but the mask
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
    behind = torch.cat([text, torch.tensor(list(suffix), dtype=torch.int64)])
    if attention_mask is not None:
        attention_mask = torch.nn.functional.pad(attention_mask.cpu(), (0, len(behind)), value=1)
    return Canvas(
        torch.cat([rows, behind.to(rows.device).expand(B, -1)], dim=1),
        config,
        mask_id=mask_id,
        start=P,
        eos_id=eos_id,
        never_ids=never_ids,
        unsure_ids=unsure_ids,
        attention_mask=attention_mask,
        seed=seed,
        network_block=network_block,
        is_traced=is_traced,
        num_top=num_top,
        forced=forced,
        slots=slots,
    )
