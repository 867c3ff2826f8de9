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
first EOS, and a forward is only run when it can commit something. Rows are independent: noise belongs to a row's seed, its
forward and the position, and a left-padded batch gives each row what it would get alone. No loop over rows, and a fixed
number of device syncs per step.

Shape legend: B rows, b rows at work, P prompt columns, G generated columns, L = P + G, N candidates, V vocabulary rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from llada.diffusion.noise import row_keys, stream_key, wide_uniforms
from llada.diffusion.objective import exclude
from llada.errors import UserError
from llada.model.predict import Model, device_of, guided_predict, resolve_mask_id
from llada.sampling.canvas import Canvas, prompt_canvas
from llada.sampling.config import SamplingConfig
from llada.sampling.rules import Candidates

_DRAW = stream_key(0, "draw")
_NEVER = 1 << 62


class Step(NamedTuple):
    """What a forward is wanted for."""

    rows: Tensor  # (b,) the canvas' rows at work; finished ones are not run
    where: Tensor  # (b, L) bool: the N positions that want logits


class GenerateOutput(NamedTuple):
    sequences: Tensor  # (B, P + G) int64, prompt included
    nfe: int  # forwards of the network (a batch counts once; guidance's doubled batch too)
    token_forwards: int  # tokens fed to the network, all rows
    # (B, G): 0-based forward that committed the token; -1 where none did (after EOS, or given)
    reveal_step: Tensor


def plan(canvas: Canvas) -> Step | None:
    """The positions of each row's current block that may be committed now; None when no mask is left.

    Changes nothing but the rows' notes of the block they work on: planning twice gives the same step.
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
    return Step(rows, where[rows]) if len(rows) else None


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
    """Draw tokens at the step's positions from `logits` (N, V), and write those that the rule chooses."""
    rows, where = step
    row, column = where.nonzero(as_tuple=True)
    slot = where.cumsum(1)[row, column] - 1
    logits = exclude(logits.double(), canvas.mask_id)
    keys = row_keys(row_keys(canvas.seed_keys[rows], canvas.forwards[rows])[row], canvas.position[column])
    rule, config = canvas.rule, canvas.config
    tokens = draw_tokens(logits, config.temperature if rule.temperature is None else rule.temperature, keys)
    candidates = Candidates(
        logits=logits,
        tokens=tokens,
        row=row,
        slot=slot,
        shape=(len(rows), int(slot.max()) + 1),
        quota=_quota(canvas, rows),
        knob=getattr(config, rule.knob) if rule.knob else 0.0,
        noise_keys=keys,
    )
    chosen = rule.choose(candidates) & candidates.exists
    chosen[:, 0] |= ~chosen.any(1)
    is_chosen = chosen[row, slot]
    committed = torch.zeros_like(where)
    committed[row, column] = is_chosen
    written = canvas.tokens[rows].masked_scatter(committed, tokens[is_chosen])
    if canvas.eos_id is not None:
        columns = torch.arange(where.shape[1], device=where.device)
        ends = committed & (written == canvas.eos_id) & (columns >= canvas.start)
        first_end = torch.where(ends, columns, where.shape[1]).amin(1, keepdim=True)
        committed &= columns <= first_end
        is_open = (canvas.tokens[rows] == canvas.mask_id) & (columns > first_end)
        written = written.masked_fill(is_open, canvas.eos_id)
    canvas.tokens[rows] = written
    canvas.reveal_step[rows] = canvas.reveal_step[rows].masked_fill(committed, canvas.nfe)
    canvas.step[rows] += 1
    canvas.forwards[rows] += 1
    canvas.nfe += 1
    canvas.token_forwards += where.numel() * (2 if canvas.config.cfg_scale else 1)


def _quota(canvas: Canvas, rows: Tensor) -> Tensor:
    """(b,) masks to commit: masks // steps, and one more in the first masks % steps of a block's (LLaDA generate.py)."""
    masks = canvas.block_masks[rows]
    steps = canvas.steps_of[rows, canvas.block[rows]].clamp(max=masks)
    return masks // steps + (canvas.step[rows] < masks % steps)


def draw_tokens(logits: Tensor, temperature: float, keys: Tensor) -> Tensor:
    """argmax(logits + temperature · Gumbel noise): samples of softmax(logits / temperature), (N,) from (N, V).

    In float64, because low-precision Gumbel noise truncates the tail and lowers the effective temperature
    (arXiv 2409.02908). `keys` (N,) are what the noise is a function of.
    """
    if temperature == 0:
        return logits.argmax(-1)
    uniform = wide_uniforms(row_keys(_DRAW, keys), logits.shape[1])
    return (logits - temperature * torch.log(-torch.log(uniform))).argmax(-1)


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
    eos_id: int | None = None,
    seed: int | Sequence[int] | None = None,
    cache: None = None,
    **knobs: Any,
) -> GenerateOutput:
    """Continue prompts by denoising `gen_length` masks behind them.

    Args:
        prompt: (B, P) int64, left-padded with `attention_mask` (B, P) 0 on the padding; or lists of ids of any lengths.
        eos_id: end the text at the first EOS. None keeps LLaDA's fixed length, tokens after EOS included.
        seed: per row; the same seed gives a row the same text in any batch.
        knobs: the fields of `SamplingConfig`: gen_length, steps, block_length, temperature, cfg_scale, remasking, …

    Raises:
        UserError: no mask id, contradictory knobs, or `cache`, which this sampler does not have.
    """
    _refuse_cache("generate", cache)
    canvas = prompt_canvas(
        prompt,
        SamplingConfig(**knobs),
        mask_id=resolve_mask_id(model, mask_id),
        eos_id=eos_id,
        attention_mask=attention_mask,
        seed=seed,
        device=device_of(model),
    )
    return _finish(model, canvas)


@takes_knobs("gen_length", block_length=None)
def infill(
    model: Model,
    tokens_with_masks: Tensor,
    *,
    attention_mask: Tensor | None = None,
    mask_id: int | None = None,
    seed: int | Sequence[int] | None = None,
    cache: None = None,
    **knobs: Any,
) -> GenerateOutput:
    """Fill the mask tokens of (B, L) `tokens_with_masks`; everything else stays. `reveal_step` is (B, L).

    `block_length` cuts the whole row into blocks; without it, the row is one. The steps go to the blocks with masks.
    """
    _refuse_cache("infill", cache)
    tokens = tokens_with_masks if tokens_with_masks.dim() == 2 else tokens_with_masks[None]
    device = device_of(model) or tokens.device
    length = max(1, tokens.shape[1])
    if knobs.get("block_length") is None:
        knobs["block_length"] = length
    canvas = Canvas(
        tokens.to(device),
        SamplingConfig(gen_length=length, **knobs),
        mask_id=resolve_mask_id(model, mask_id),
        start=0,
        attention_mask=None if attention_mask is None else attention_mask.to(device),
        seed=seed,
    )
    return _finish(model, canvas)


def _refuse_cache(function: str, cache: object) -> None:
    if cache is not None:
        raise UserError(f"{function}: cache={cache!r} is not available, use cache=None")


def _finish(model: Model, canvas: Canvas) -> GenerateOutput:
    for _ in denoise(model, canvas):
        pass
    revealed = canvas.reveal_step[:, canvas.start :]
    return GenerateOutput(canvas.tokens, canvas.nfe, canvas.token_forwards, revealed)
