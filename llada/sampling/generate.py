"""Continue prompts and fill gaps: what a caller from Python uses, around the one loop.

Shape legend: B rows, P prompt columns, G generated columns, L = P + G.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

from llada.errors import UserError
from llada.model.predict import (
    Model,
    check_tokens,
    check_weights,
    config_eos_id,
    device_of,
    network_block,
    resolve_mask_id,
)
from llada.sampling.canvas import Canvas, prompt_canvas
from llada.sampling.compiled import compile_network
from llada.sampling.config import SamplingConfig, check_room
from llada.sampling.constraints import named_ids
from llada.sampling.inputs import as_ids, as_rows
from llada.sampling.length import OF_GROWING
from llada.sampling.sampler import denoise
from llada.settings import shorten


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
    batch_invariant: bool = False,
    compiled: bool = False,
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
        batch_invariant: so exactly in any precision, and at some cost: matrix products have one shape whatever the batch.
        compiled: the network is compiled first, unless it is already, and stays so (`compile_network`).
        knobs: the fields of `SamplingConfig`: gen_length, steps, block_length, temperature, cfg_scale, remasking, …

    Raises:
        UserError: no mask id, ids outside of the vocabulary, a canvas longer than the model's context, contradictory knobs,
            or some that this model cannot heed (`check_network`).
        FloatingPointError: logits that are no numbers (see `commit`).
    """
    if compiled:
        compile_network(model)
    config = SamplingConfig(**knobs)
    canvas = prompt_canvas(
        prompt,
        config,
        mask_id=resolve_mask_id(model, mask_id),
        eos_id=eos_id,
        **held_back(config, as_ids(eos_id) or as_ids(config_eos_id(model)), eot_id),
        attention_mask=attention_mask,
        seed=seed,
        network_block=network_block(model),
    )
    context = getattr(getattr(model, "config", None), "max_length", None)
    check_room(config, canvas.tokens.shape[1] - config.gen_length, context)
    return _finish("generate", model, canvas, batch_invariant)


@takes_knobs("gen_length", "fixed", "initial_length", *OF_GROWING, block_length=None)
def infill(
    model: Model,
    tokens_with_masks: Tensor,
    *,
    attention_mask: Tensor | None = None,
    mask_id: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    eot_id: int | None = None,
    seed: int | Sequence[int] | None = None,
    batch_invariant: bool = False,
    compiled: bool = False,
    **knobs: Any,
) -> GenerateOutput:
    """Fill the mask tokens of (B, L) `tokens_with_masks`; everything else stays. `reveal_step` is (B, L).

    `block_length` cuts a row into blocks from its first token on; without it, the row is one, or has the blocks of a
    block-causal network, which sees what stands behind a gap only within its block. The steps go to the blocks
    with masks. `attention_mask` is 0 on the padding at either end of a row. An EOS ends nothing here, because the row goes
    on behind a gap: `eos_id` (None: the model's) and `eot_id` are what `logits_eos_inf` and `confidence_eos_eot_inf` mean.
    """
    if compiled:
        compile_network(model)
    refuse_knobs(
        "infill",
        knobs,
        fixed="write the tokens into tokens_with_masks",
        initial_length="the gaps are as long as their masks",
    )
    if not isinstance(tokens_with_masks, Tensor):
        raise UserError(f"infill: tokens_with_masks is a tensor (B, L), not {shorten(tokens_with_masks)}")
    tokens = as_rows(tokens_with_masks)
    length = max(1, tokens.shape[1])
    if knobs.get("block_length") is None:
        knobs["block_length"] = network_block(model) or length
    config = SamplingConfig(gen_length=length, **knobs)
    canvas = Canvas(
        tokens,
        config,
        mask_id=resolve_mask_id(model, mask_id),
        start=0,
        **held_back(config, as_ids(eos_id) or as_ids(config_eos_id(model)), eot_id),
        attention_mask=attention_mask,
        seed=seed,
        network_block=network_block(model),
    )
    return _finish("infill", model, canvas, batch_invariant)


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


def _finish(function: str, model: Model, canvas: Canvas, batch_invariant: bool) -> GenerateOutput:
    ids = torch.cat([canvas.end_ids, canvas.never_ids, canvas.unsure_ids], dim=1)
    check_tokens(function, model, canvas.tokens, ids[ids >= 0])
    for config in canvas.configs[:1]:  # the same for all
        check_tokens(function, model, *named_ids(config).values())
    for number, _ in enumerate(denoise(model, canvas, batch_invariant=batch_invariant)):
        if number == 0:
            check_weights(model)  # what the logits of the first forward did not show
    start = int(canvas.start[0]) if len(canvas) else 0
    device = device_of(model) or canvas.device
    return GenerateOutput(
        canvas.tokens.to(device),
        canvas.nfe,
        int(canvas.token_forwards.sum()),
        canvas.reveal_step[:, start:].to(device),
    )
