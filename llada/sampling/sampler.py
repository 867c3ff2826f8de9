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

from llada.diffusion.noise import row_keys, stream_key, wide_uniforms
from llada.errors import UserError
from llada.model.predict import (
    Model,
    check_tokens,
    config_eos_id,
    device_of,
    guided_predict,
    resolve_mask_id,
)
from llada.sampling.canvas import Canvas, as_ids, as_rows, prompt_canvas
from llada.sampling.config import SamplingConfig
from llada.sampling.rules import Candidates
from llada.settings import shorten

_DRAW = stream_key(0, "draw")
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
    masks = canvas.tokens == canvas.mask_id
    block = torch.where(masks, canvas.block_of, _NEVER).amin(1) if masks.shape[1] else canvas.block
    where = masks & (canvas.block_of == block[:, None])
    is_new = block != canvas.block
    canvas.block_masks = torch.where(is_new, where.sum(1), canvas.block_masks)
    canvas.step = canvas.step.masked_fill(is_new, 0)
    canvas.block = block
    if canvas.due is not None and canvas.due.shape[1]:
        due = canvas.due.masked_fill(~where, _NEVER)
        where = where & (due == due.amin(1, keepdim=True))
    rows = where.any(1).nonzero().squeeze(1)
    if not len(rows):
        canvas.close_texts()
        return None
    return Step(rows, where[rows])


@torch.no_grad()
def forward(model: Model, canvas: Canvas, step: Step) -> Tensor:
    """Logits (N, V) at the step's positions, in row-major order, guidance applied."""
    rows = step.rows
    inputs: dict[str, Tensor] = {}
    if canvas.attention_mask is not None:
        inputs["attention_mask"] = canvas.attention_mask[rows]
    scale = canvas.config.cfg_scale
    return guided_predict(
        model, canvas.tokens[rows], step.where, canvas.prompt[rows], scale, canvas.mask_id, **inputs
    )


def commit(canvas: Canvas, step: Step, logits: Tensor) -> None:
    """Draw tokens at the step's positions from `logits` (N, V), and write those that the rule chooses.

    Raises FloatingPointError, before anything is written, when the logits of a position are not finite (single ids may be
    at −∞).
    """
    rows, where = step
    row, column = where.nonzero(as_tuple=True)
    slot = where.cumsum(1)[row, column] - 1
    position = canvas.position[rows[row], column]
    keys = row_keys(row_keys(canvas.seed_keys[rows], canvas.forwards[rows])[row], position)
    rule, config = canvas.rule, canvas.config
    rounding = _ROUNDING * (1 + 2 * config.cfg_scale)
    logits = _writable(canvas, logits, position)
    # One wait for the device: how wide the table of candidates is, and whether all is well.
    width, is_finite = torch.stack([slot.max() + 1, logits.amax(-1).isfinite().all()]).tolist()
    if not is_finite:
        raise FloatingPointError(
            f"the network's logits are not finite (NaN or infinite) in forward {canvas.nfe} of {tuple(where.shape)} tokens: "
            "its weights are damaged, or the precision does not hold them"
        )
    tokens = draw_tokens(logits, canvas.temperature, keys, rounding)
    candidates = Candidates(
        logits=logits,
        tokens=tokens,
        row=row,
        slot=slot,
        shape=(len(rows), width),
        quota=_quota(canvas, rows),
        knob=getattr(config, rule.knob) if rule.knob else 0.0,
        noise_keys=keys,
        doubt=rounding * (1 + logits.gather(1, tokens[:, None]).squeeze(1).abs()),
        unsure_ids=canvas.unsure_ids,
    )
    chosen = rule.choose(candidates) & candidates.exists
    chosen[:, 0] |= ~chosen.any(1)
    # When the steps left are no more than the blocks left, each block has to be done in one.
    is_last = canvas.steps[rows] - canvas.forwards[rows] <= canvas.blocks_left[rows, canvas.block[rows]]
    chosen |= candidates.exists & is_last[:, None]
    is_chosen = chosen[row, slot]
    committed = torch.zeros_like(where)
    committed[row, column] = is_chosen
    written = canvas.tokens[rows].masked_scatter(committed, tokens[is_chosen])
    if len(canvas.end_ids):
        columns = torch.arange(where.shape[1], device=where.device)
        first_end = canvas.first_end(committed & torch.isin(written, canvas.end_ids))
        committed &= columns <= first_end
        is_open = (canvas.tokens[rows] == canvas.mask_id) & (columns > first_end)
        written = torch.where(is_open, canvas.end_ids[0], written)
    canvas.tokens[rows] = written
    canvas.reveal_step[rows] = canvas.reveal_step[rows].masked_fill(committed, canvas.nfe)
    canvas.step[rows] += 1
    canvas.forwards[rows] += 1
    canvas.nfe += 1
    canvas.token_forwards += where.numel() * (2 if canvas.config.cfg_scale else 1)


def _writable(canvas: Canvas, logits: Tensor, position: Tensor) -> Tensor:
    """A float64 copy of the logits (N, V), at −∞ for what must not stand at the positions (N,)."""
    logits = logits.to(torch.float64, copy=True).index_fill_(1, canvas.never_ids, -torch.inf)
    if canvas.open_until and len(canvas.end_ids):
        ends = logits[:, canvas.end_ids]
        logits[:, canvas.end_ids] = ends.masked_fill((position < canvas.open_until)[:, None], -torch.inf)
    return logits


def _quota(canvas: Canvas, rows: Tensor) -> Tensor:
    """(b,) masks to commit: masks // steps, and one more in the first masks % steps of a block's (LLaDA generate.py)."""
    masks = canvas.block_masks[rows]
    steps = canvas.steps_of[rows, canvas.block[rows]].clamp(max=masks)
    return masks // steps + (canvas.step[rows] < masks % steps)


def draw_tokens(logits: Tensor, temperature: float, keys: Tensor, rounding: float = 0.0) -> Tensor:
    """argmax(logits + temperature · Gumbel noise): samples of softmax(logits / temperature), (N,) from (N, V).

    In float64, because low-precision Gumbel noise truncates the tail and lowers the effective temperature
    (arXiv 2409.02908). `keys` (N,) are what it is a function of. Values are equal, and the lowest id is taken, within
    `rounding` per unit of the highest one.
    """
    if temperature != 0:
        uniform = wide_uniforms(row_keys(_DRAW, keys), logits.shape[1])
        logits = logits - temperature * torch.log(-torch.log(uniform))
    best = logits.amax(-1, keepdim=True)
    return (logits >= best - rounding * (1 + best.abs())).to(torch.int8).argmax(-1)


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
    cache: None = None,
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
    _refuse_cache("generate", cache)
    config = SamplingConfig(**knobs)
    canvas = prompt_canvas(
        prompt,
        config,
        mask_id=resolve_mask_id(model, mask_id),
        eos_id=eos_id,
        **held_back(config, as_ids(eos_id) or as_ids(config_eos_id(model)), eot_id),
        attention_mask=attention_mask,
        seed=seed,
        device=device_of(model),
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
    cache: None = None,
    **knobs: Any,
) -> GenerateOutput:
    """Fill the mask tokens of (B, L) `tokens_with_masks`; everything else stays. `reveal_step` is (B, L).

    `block_length` cuts a row into blocks from its first token on; without it, the row is one. The steps go to the blocks
    with masks. `attention_mask` is 0 on the padding at either end of a row. An EOS ends nothing here, because the row goes
    on behind a gap: `eos_id` (None: the model's) and `eot_id` are what `logits_eos_inf` and `confidence_eos_eot_inf` mean.
    """
    _refuse_cache("infill", cache)
    refuse_knobs("infill", knobs, fixed="write the tokens into tokens_with_masks")
    if not isinstance(tokens_with_masks, Tensor):
        raise UserError(f"infill: tokens_with_masks is a tensor (B, L), not {shorten(tokens_with_masks)}")
    tokens = as_rows(tokens_with_masks)
    device = device_of(model) or tokens.device
    length = max(1, tokens.shape[1])
    if knobs.get("block_length") is None:
        knobs["block_length"] = length
    config = SamplingConfig(gen_length=length, **knobs)
    canvas = Canvas(
        tokens.to(device),
        config,
        mask_id=resolve_mask_id(model, mask_id),
        start=0,
        **held_back(config, as_ids(eos_id) or as_ids(config_eos_id(model)), eot_id),
        attention_mask=None if attention_mask is None else attention_mask.to(device),
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


def _refuse_cache(function: str, cache: object) -> None:
    if cache is not None:
        raise UserError(f"{function}: cache={cache!r} is not available, use cache=None")


def _finish(function: str, model: Model, canvas: Canvas) -> GenerateOutput:
    ids = [canvas.mask_id, *canvas.end_ids.tolist(), *canvas.never_ids.tolist(), *canvas.unsure_ids.tolist()]
    check_tokens(function, model, canvas.tokens, torch.tensor(ids))
    for _ in denoise(model, canvas):
        pass
    revealed = canvas.reveal_step[:, canvas.start :]
    return GenerateOutput(canvas.tokens, canvas.nfe, canvas.token_forwards, revealed)
