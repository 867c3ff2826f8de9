"""Text longer than the model: MDLM's strided semi-autoregressive rounds (arXiv 2406.07524, §4.2; diffusion.py:957-997)."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llada.diffusion.noise import stream_key
from llada.errors import UserError
from llada.model.predict import Model, device_of, network_block, resolve_mask_id
from llada.sampling.generate import GenerateOutput, generate, refuse_knobs, takes_knobs
from llada.sampling.inputs import as_ids, row_seeds
from llada.settings import shorten


@takes_knobs("gen_length", "fixed", block_length=None, remasking="ancestral")
def generate_rounds(
    model: Model,
    *,
    rows: int | None = None,
    window: int,
    stride: int,
    num_strides: int,
    prompt: Tensor | None = None,
    mask_id: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    eot_id: int | None = None,
    seed: int | Sequence[int] | None = None,
    **knobs: Any,
) -> GenerateOutput:
    """Generate `window + num_strides · stride` tokens in windows of `window`.

    The first round fills a whole window; each next one keeps the last window − stride tokens as its context and fills
    `stride` new masks behind them. Each round is a `generate` with these knobs, by default MDLM's ancestral sampler and
    one block.

    Args:
        rows: texts without a prompt; None is 1.
        prompt: (B, P) integers the first window starts with, all of one length; then B counts and `rows` must be left alone.
        eos_id: a text that has ended stays ended; None: no end.
        eot_id: as in `generate`.

    Returns:
        `sequences` (B, window + num_strides · stride); `reveal_step` counts the forwards of all rounds.

    Raises:
        UserError: numbers that make no rounds, and what `generate` refuses.
    """
    for name, value, low in (
        ("rows", 1 if rows is None else rows, 1),
        ("window", window, 1),
        ("stride", stride, 1),
        ("num_strides", num_strides, 0),
    ):
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
            raise UserError(f"rounds: {name} must be an integer of at least {low}, not {shorten(value)}")
    if stride >= window:
        raise UserError(f"rounds: need 0 < stride < window, not {stride} and {window}")
    context = getattr(getattr(model, "config", None), "max_length", None)
    if context is not None and window > context:
        raise UserError(f"rounds: window={window} exceeds the context length of {context}: at most that")
    if prompt is not None and (not isinstance(prompt, Tensor) or prompt.dim() != 2):
        raise UserError(f"rounds: the prompt is a tensor of ids (B, P), not {shorten(prompt)}")
    if prompt is not None and rows not in (None, len(prompt)):
        raise UserError(f"rounds: rows={rows} contradicts the prompt of {len(prompt)} rows: leave it out")
    refuse_knobs("rounds", knobs, fixed="every round has positions of its own; generate() takes it")
    mask_id = resolve_mask_id(model, mask_id)
    knobs = {"remasking": "ancestral", **knobs}
    block_length = knobs.pop("block_length", None)
    device = device_of(model)
    tokens = torch.empty(rows or 1, 0, dtype=torch.int64, device=device)
    if prompt is not None:
        tokens = prompt.to(device)
    if tokens.shape[1] >= window:
        raise UserError(f"rounds: the prompt of {tokens.shape[1]} tokens fills the window of {window}")
    seeds = None if seed is None else row_seeds(seed, len(tokens))
    start = tokens.shape[1]
    nfe = token_forwards = 0
    ends = as_ids(eos_id)
    reveal = torch.full_like(tokens, -1)
    for k in range(num_strides + 1):
        context = tokens if k == 0 else tokens[:, -(window - stride) :]
        length = window - tokens.shape[1] if k == 0 else stride
        out = generate(
            model,
            context,
            gen_length=length,
            block_length=block_length or network_block(model) or length,
            mask_id=mask_id,
            eos_id=eos_id,
            eot_id=eot_id,
            # Every round needs noise of its own.
            seed=seeds if k == 0 or seeds is None else [stream_key(s, "round", k) for s in seeds],
            **knobs,
        )
        fresh = out.sequences[:, context.shape[1] :]
        revealed = torch.where(out.reveal_step < 0, -1, out.reveal_step + nfe)
        if ends:  # a text that ended in an earlier round stays ended
            ended = torch.isin(tokens[:, start:], torch.tensor(ends, device=tokens.device)).any(1)
            fresh[ended], revealed[ended] = ends[0], -1
        tokens = torch.cat([tokens, fresh], dim=1)
        reveal = torch.cat([reveal, revealed], dim=1)
        nfe += out.nfe
        token_forwards += out.token_forwards
    return GenerateOutput(tokens, nfe, token_forwards, reveal[:, start:])
