"""The one denoising loop, turned inside out: `plan` says which positions want logits, the caller runs the forward,
`commit` writes tokens.

    while (step := plan(canvas)) is not None:
        commit(canvas, step, forward(model, canvas, step))

`generate`, `infill`, the engine and batch inference differ in who calls the network, and for how many canvases at once: a
cache is a way to run the forward, logits of several canvases from one forward go to each canvas' own `commit`, a
block-causal network is another network, and tokens that must not stand at a position have their logits at −∞ before it.
LLaDA's reverse process is generate.py of ML-GSAI/LLaDA; remasking="ancestral" is MDLM's sampler, which skips the forwards
that would change nothing.

Kept at every step: the mask token is never produced, a committed token never changes, nothing is committed after the
first EOS, a forward is only run when it can commit something, and logits that are no numbers end the run. At the end,
what had been committed behind the EOS before it came is EOS too. No loop over rows, and a fixed number of device syncs per
step.

Rows are independent: noise belongs to a row's seed, its forward and the position; positions count from a row's first
token; and what differs by no more than rounding (`_ROUNDING`) is equal, the lowest position and the lowest id coming first. So
a row of a padded batch gets in float32 what it would get alone. In bfloat16 the kernels round by the shape of the batch,
and that decides between tokens that are nearly equally likely: of 300 rows of 16 tokens, in batches of four left-padded
prompts on a CPU, 10 differed from the row alone (9 at temperature 1; none of 75 empty prompts; in float32 none of 125).

Shape legend: B rows, b rows at work, P prompt columns, G generated columns, L = P + G, N candidates, V vocabulary rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

from llada.diffusion.noise import row_keys
from llada.errors import UserError
from llada.model.predict import (
    Model,
    check_tokens,
    config_eos_id,
    device_of,
    guided_predict,
    resolve_mask_id,
    takes_packed_rows,
)
from llada.sampling.cache import Stretch, View, choose_columns
from llada.sampling.canvas import Canvas, as_ids, as_rows, attended_span, prompt_canvas
from llada.sampling.config import SamplingConfig
from llada.sampling.draw import draw_tokens
from llada.sampling.packed import Fed, packed_forward
from llada.sampling.rules import Candidates
from llada.settings import shorten

_NEVER = 1 << 62
# How far apart equal logits may come out of two float32 forwards that differ in shape, per unit of their size. Less
# precise logits are not spared: what they leave undecided is decided by them, and only exact equals are equal.
_ROUNDING = 16 * torch.finfo(torch.float32).eps


class Step(NamedTuple):
    """What a forward is wanted for."""

    rows: Tensor  # (b,) the canvas' rows at work; finished ones are not run
    where: Tensor  # (b, L) bool: the N positions that want logits


class HeldBack(TypedDict):
    """Two arguments of a canvas."""

    never_ids: list[int]
    unsure_ids: list[int]


class GenerateOutput(NamedTuple):
    sequences: Tensor  # (B, P + G) int64, prompt included
    nfe: int  # forwards of the network (a batch counts once; guidance's doubled batch too)
    token_forwards: int  # tokens fed to the network, all rows
    # (B, G): 0-based forward that committed the token; -1 where none did (behind EOS, or given)
    reveal_step: Tensor


def plan(canvas: Canvas) -> Step | None:
    """The positions of each row's current block that may be committed now. None when no mask is left: the texts are then
    closed behind their first EOS.

    Until then it changes nothing but the rows' notes of the block they work on: planning twice gives the same step.
    """
    masks = (canvas.tokens == canvas.mask_id) & canvas.attended
    block = torch.where(masks, canvas.block_of, _NEVER).amin(1) if masks.shape[1] else canvas.block
    in_block = canvas.block_of == block[:, None]
    where = masks & in_block
    is_new = block != canvas.block
    if bool(is_new.any()):
        # A hole in the prompt belongs to the first block, which otherwise begins with the text.
        begin, end = _reach(in_block & canvas.attended & (masks | (canvas.position >= 0)))
        canvas.block_begin = torch.where(is_new, begin, canvas.block_begin)
        canvas.block_end = torch.where(is_new, end, canvas.block_end)
        canvas.block_masks = torch.where(is_new, where.sum(1), canvas.block_masks)
        canvas.step = canvas.step.masked_fill(is_new, 0)
        canvas.block = block
    if where.shape[1]:
        due = canvas.due.masked_fill(~where, _NEVER)
        where = where & (due == due.amin(1, keepdim=True))
    rows = where.any(1).nonzero().squeeze(1)
    if not len(rows):
        canvas.close_texts()
        return None
    return Step(rows, where[rows])


def _reach(marks: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) and (B,): the first marked column of (B, L), and the one behind the last."""
    if not marks.shape[1]:
        return torch.zeros(len(marks), dtype=torch.int64), torch.zeros(len(marks), dtype=torch.int64)
    values = marks.to(torch.int8)
    return values.argmax(1), marks.shape[1] - values.flip(1).argmax(1)


@torch.no_grad()
def forward(model: Model, canvas: Canvas, step: Step) -> Tensor:
    """Logits (N, V) at the step's positions, in row-major order, guidance applied; counts the tokens that it feeds."""
    if takes_packed_rows(model):
        return _forward_packed(model, canvas, step)
    return _forward_plain(model, canvas, step)


def _forward_packed(model: Model, canvas: Canvas, step: Step) -> Tensor:
    notes = (canvas.first, canvas.stop, canvas.block_begin, canvas.block_end, canvas.forwards, canvas.step)
    table = torch.stack(notes)[:, step.rows].T.tolist()
    scales = canvas.cfg_scale[step.rows]
    places = [where.nonzero().squeeze(1) for where in step.where]
    fed: list[Fed] = []
    wanted: list[Tensor] = []
    unguided: list[tuple[Fed, Tensor]] = []
    for row, places_of_row, scale, (first, stop, begin, end, forwards, age) in zip(
        step.rows.tolist(), places, scales.tolist(), table, strict=True
    ):
        config, cache = canvas.configs[row], canvas.caches[row]
        if config.suffix_window is not None:
            stop = min(stop, end + config.suffix_window)
        view = View(Stretch(first, stop), Stretch(begin, min(end, stop)), forwards, config)
        columns = choose_columns(view, cache, is_new_block=age == 0)
        stores = (
            cache.stores_for(model, stop - first, copies=1 + (scale != 0)) if config.cache else [None, None]
        )
        tokens = canvas.tokens[row, columns.begin : columns.end]
        at = places_of_row - columns.begin
        fed.append(Fed(tokens, columns.begin - first, stop - first, stores[0]))
        wanted.append(at)
        if scale != 0:
            hidden = tokens.masked_fill(canvas.prompt[row, columns.begin : columns.end], canvas.mask_id)
            unguided.append((Fed(hidden, columns.begin - first, stop - first, stores[1]), at))
        canvas.token_forwards[row] += len(tokens) * (1 + (scale != 0))
    logits = packed_forward(model, [*fed, *(f for f, _ in unguided)], [*wanted, *(at for _, at in unguided)])
    if not unguided:
        return logits
    counts = step.where.sum(1)
    scale_of = scales.repeat_interleave(counts)
    is_guided = (scale_of != 0).nonzero().squeeze(1).to(logits.device)
    conditional, unconditional = logits[: len(scale_of)], logits[len(scale_of) :]
    scale_of = scale_of.to(logits.device, logits.dtype)[is_guided, None]
    guided = unconditional + (scale_of + 1) * (conditional[is_guided] - unconditional)
    return conditional.index_copy(0, is_guided, guided)


def _forward_plain(model: Model, canvas: Canvas, step: Step) -> Tensor:
    """Of a function of whole rows, which are fed to their end; those between the same columns go together."""
    rows, device = step.rows, device_of(model) or canvas.device
    begin, end = attended_span(canvas.attended[rows])
    spans = torch.stack([begin, end, (canvas.cfg_scale[rows] != 0).long()], dim=1)
    counts = step.where.sum(1)
    row_of = torch.arange(len(rows)).repeat_interleave(counts)
    logits: Tensor | None = None
    for first, stop, guided in spans.unique(dim=0).tolist():
        same = (spans == torch.tensor([first, stop, guided])).all(1)
        here, columns = rows[same], slice(first, stop)
        scale = canvas.cfg_scale[here].repeat_interleave(counts[same])[:, None]
        out = guided_predict(
            model,
            canvas.tokens[here, columns].to(device),
            step.where[same, columns].to(device),
            canvas.prompt[here, columns].to(device),
            scale.to(device) if guided else 0.0,
            canvas.mask_id,
        )
        canvas.token_forwards[here] += (stop - first) * (1 + guided)
        if logits is None:
            logits = out.new_empty(len(row_of), out.shape[-1])
        logits[same[row_of].to(device)] = out
    assert logits is not None
    return logits


def commit(canvas: Canvas, step: Step, logits: Tensor) -> None:
    """Draw tokens at the step's positions from `logits` (N, V), and write those that the rules choose. The logits may be
    changed in place.

    Raises FloatingPointError, before anything is written, when the logits of a position are not finite (single ids may be
    at −∞).
    """
    rows, where = step
    row, column = where.nonzero(as_tuple=True)
    canvas_row = rows[row]
    slot = where.cumsum(1)[row, column] - 1
    position = canvas.position[canvas_row, column]
    keys = row_keys(row_keys(canvas.seed_keys[rows], canvas.forwards[rows])[row], position)
    rounding = (_ROUNDING * (1 + 2 * canvas.cfg_scale[rows]))[row]
    logits = _writable(canvas, logits, canvas_row, position)
    if not bool(logits.amax(-1).isfinite().all()):
        raise FloatingPointError(
            f"the network's logits are not finite (NaN or infinite) in forward {canvas.nfe} of {tuple(where.shape)} tokens: "
            "its weights are damaged, or the precision does not hold them"
        )
    temperature = canvas.temperature[canvas_row]
    tokens = draw_tokens(logits, temperature, keys, rounding)
    own = logits.gather(1, tokens[:, None]).squeeze(1).cpu()
    tokens = tokens.cpu()
    unsure = canvas.unsure_ids[canvas_row]
    everything = Candidates(
        logits=logits,
        tokens=tokens,
        row=row,
        slot=slot,
        shape=(len(rows), int(slot.max()) + 1),
        quota=_quota(canvas, rows),
        knob=canvas.knob[rows, None],
        noise_keys=keys,
        doubt=rounding * (1 + own.abs()),
        unsure_ids=unsure if bool((unsure != canvas.mask_id).any()) else None,
    )
    rules = [canvas.rules[r] for r in rows.tolist()]
    chosen = torch.zeros(everything.shape, dtype=torch.bool)
    for rule in dict.fromkeys(rules):
        own_rows = torch.tensor([other is rule for other in rules])
        candidates = everything if bool(own_rows.all()) else everything.of_rows(own_rows)
        chosen[own_rows, : candidates.shape[1]] = rule.choose(candidates) & candidates.exists
    chosen[:, 0] |= ~chosen.any(1)
    # When the steps left are no more than the blocks left, each block has to be done in one.
    is_last = canvas.steps[rows] - canvas.forwards[rows] <= canvas.blocks_left[rows, canvas.block[rows]]
    chosen |= everything.exists & is_last[:, None]
    is_chosen = chosen[row, slot]
    committed = torch.zeros_like(where)
    committed[row, column] = is_chosen
    written = canvas.tokens[rows].masked_scatter(committed, tokens[is_chosen])
    columns = torch.arange(where.shape[1])
    ends = (written[:, :, None] == canvas.end_ids[rows][:, None]).any(-1) & committed
    first_end = torch.where(ends & (columns >= canvas.start[rows, None]), columns, _NEVER).amin(1)
    committed &= columns <= first_end[:, None]
    is_open = (canvas.tokens[rows] == canvas.mask_id) & (columns > first_end[:, None])
    written = torch.where(is_open, canvas.end_ids[rows, :1], written)
    canvas.tokens[rows] = written
    canvas.reveal_step[rows] = torch.where(committed, canvas.forwards[rows, None], canvas.reveal_step[rows])
    canvas.shorten(rows, first_end)
    canvas.step[rows] += 1
    canvas.forwards[rows] += 1
    canvas.nfe += 1


def _writable(canvas: Canvas, logits: Tensor, row: Tensor, position: Tensor) -> Tensor:
    """The logits (N, V) in at least float32, at −∞ for what must not stand at the positions (N,) of the rows (N,)."""
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    logits = logits.scatter_(1, canvas.never_ids[row].to(logits.device), -torch.inf)
    too_early = position < canvas.open_until[row]
    if bool(too_early.any()):
        ends = canvas.end_ids[row]
        ends = torch.where(too_early[:, None] & (ends >= 0), ends, canvas.mask_id)
        logits = logits.scatter_(1, ends.to(logits.device), -torch.inf)
    return logits


def _quota(canvas: Canvas, rows: Tensor) -> Tensor:
    """(b,) masks to commit: masks // steps, and one more in the first masks % steps of a block's (LLaDA generate.py)."""
    masks = canvas.block_masks[rows]
    steps = canvas.steps_of[rows, canvas.block[rows]].clamp(max=masks)
    return masks // steps + (canvas.step[rows] < masks % steps)


def denoise(model: Model, canvas: Canvas) -> Iterator[Canvas]:
    """Walk the canvas to its end, yielding it (changed in place) after every forward."""
    while (step := plan(canvas)) is not None:
        commit(canvas, step, forward(model, canvas, step))
        yield canvas


F = TypeVar("F", bound=Callable[..., Any])


def takes_knobs(*without: str, **defaults: Any) -> Callable[[F], F]:
    """Show the fields of `SamplingConfig` (but `without`) as keyword arguments in the place of **knobs; `defaults` are
    those of the function that differ."""

    def show(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        kind = inspect.Parameter.KEYWORD_ONLY
        knobs = [
            inspect.Parameter(
                field.name, kind, default=defaults.get(field.name, field.default), annotation=field.type
            )
            for field in fields(SamplingConfig)
            if field.name not in (*without, *signature.parameters)
        ]
        function.__signature__ = signature.replace(parameters=own + knobs)  # type: ignore[attr-defined]
        return function

    return show


@takes_knobs()
def generate(
    model: Model,
    prompt: Tensor | Sequence[Sequence[int]],
    *,
    attention_mask: Tensor | None = None,
    mask_id: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    eot_id: int | None = None,
    seed: int | Sequence[int] | None = None,
    **knobs: Any,
) -> GenerateOutput:
    """Continue prompts by denoising `gen_length` masks behind them.

    Args:
        prompt: (B, P) integers, with `attention_mask` (B, P) 0 on the padding (a row that is padded on the right is moved to
            the right, in `sequences` too); or lists of ids of any lengths, which are left-padded.
        eos_id: end the text at the first EOS (the first of these ids): behind it `sequences` hold EOS and nothing else. None
            keeps LLaDA's fixed length, tokens behind EOS included.
        eot_id: the end of a turn, which `confidence_eos_eot_inf` holds back beside EOS; None: the model has none.
        seed: per row; the same seed gives a row the same text in any batch (llada/sampling/sampler.py says how exactly).
        knobs: the fields of `SamplingConfig`: gen_length, steps, block_length, temperature, cfg_scale, remasking, …

    Raises:
        UserError: no mask id, ids outside of the vocabulary, a canvas longer than the model's context, contradictory knobs,
            or `cache`, which this sampler does not have.
        FloatingPointError: logits that are no numbers (see `commit`).
    """
    config = SamplingConfig(**knobs)
    canvas = prompt_canvas(
        prompt,
        config,
        mask_id=resolve_mask_id(model, mask_id),
        eos_id=eos_id,
        **held_back(config, as_ids(eos_id) or as_ids(config_eos_id(model)), eot_id),
        attention_mask=attention_mask,
        seed=seed,
    )
    return _finish("generate", model, canvas)


@takes_knobs("gen_length", "fixed", block_length=None)
def infill(
    model: Model,
    tokens_with_masks: Tensor,
    *,
    attention_mask: Tensor | None = None,
    mask_id: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    eot_id: int | None = None,
    seed: int | Sequence[int] | None = None,
    **knobs: Any,
) -> GenerateOutput:
    """Fill the mask tokens of (B, L) `tokens_with_masks`; everything else stays. `reveal_step` is (B, L).

    `block_length` cuts a row into blocks from its first token on; without it, the row is one. The steps go to the blocks
    with masks. `attention_mask` is 0 on the padding at either end of a row. An EOS ends nothing here, because the row goes
    on behind a gap: `eos_id` (None: the model's) and `eot_id` are what `logits_eos_inf` and `confidence_eos_eot_inf` mean.
    """
    refuse_knobs("infill", knobs, fixed="write the tokens into tokens_with_masks")
    if not isinstance(tokens_with_masks, Tensor):
        raise UserError(f"infill: tokens_with_masks is a tensor (B, L), not {shorten(tokens_with_masks)}")
    tokens = as_rows(tokens_with_masks)
    length = max(1, tokens.shape[1])
    if knobs.get("block_length") is None:
        knobs["block_length"] = length
    config = SamplingConfig(gen_length=length, **knobs)
    canvas = Canvas(
        tokens,
        config,
        mask_id=resolve_mask_id(model, mask_id),
        start=0,
        **held_back(config, as_ids(eos_id) or as_ids(config_eos_id(model)), eot_id),
        attention_mask=attention_mask,
        seed=seed,
    )
    return _finish("infill", model, canvas)


def held_back(config: SamplingConfig, eos_ids: Sequence[int], eot_id: int | None) -> HeldBack:
    """What LLaDA's two settings for EOS mean with these ids, among which `eot_id` may be.

    Raises UserError when one is set and the id of EOS is unknown.
    """
    eos_ids = [token for token in eos_ids if token != eot_id]
    for name in ("logits_eos_inf", "confidence_eos_eot_inf"):
        if getattr(config, name) and not eos_ids:
            raise UserError(
                f"sampling: {name} needs the id of EOS, which the model does not declare: pass eos_id=…"
            )
    return {
        "never_ids": list(eos_ids) if config.logits_eos_inf else [],
        "unsure_ids": [*eos_ids, *as_ids(eot_id)] if config.confidence_eos_eot_inf else [],
    }


def refuse_knobs(function: str, knobs: dict[str, Any], **reasons: str) -> None:
    """Raise UserError for a knob that means nothing to this function, with what to do instead."""
    for name, instead in reasons.items():
        if knobs.get(name) is not None:
            raise UserError(f"{function}: {name}={shorten(knobs[name])} means nothing here: {instead}")


def _finish(function: str, model: Model, canvas: Canvas) -> GenerateOutput:
    ids = torch.cat([canvas.end_ids, canvas.never_ids, canvas.unsure_ids], dim=1)
    check_tokens(function, model, canvas.tokens, ids[ids >= 0])
    for _ in denoise(model, canvas):
        pass
    start = int(canvas.start[0]) if len(canvas) else 0
    device = device_of(model) or canvas.device
    return GenerateOutput(
        canvas.tokens.to(device),
        canvas.nfe,
        int(canvas.token_forwards.sum()),
        canvas.reveal_step[:, start:].to(device),
    )
