"""What the engine is asked for: one reply, and whether this network can write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from llada.errors import UserError
from llada.model.predict import Model, check_tokens, network_block
from llada.sampling.blocks import check_network_block, check_steps, count_blocks
from llada.sampling.config import SamplingConfig, check_room, check_window
from llada.sampling.constraints import named_ids
from llada.sampling.forward import check_network
from llada.sampling.slots import Slots
from llada.sampling.text import spell_fixed


@dataclass(frozen=True)
class GenerateRequest:
    """A reply of `sampling.gen_length` masks at the most, between a prompt and (for infilling) a suffix."""

    prompt: Sequence[int]
    sampling: SamplingConfig
    suffix: Sequence[int] = ()
    seed: int | None = None
    stop: Sequence[str] = ()
    end_ids: frozenset[int] | None = None
    """What ends the text; None: the model's and tokenizer's EOS, and <|eot_id|>."""
    wants_drafts: bool = False
    """After every forward, also the whole reply with its masks (`Draft`)."""
    wants_trace: bool = False
    """With every text, also its tokens: which forward each came from, and how sure the model was of it then (`Token`)."""
    num_top: int = 0
    """Of `wants_trace`: and so many of the likeliest tokens in its place."""
    forced: Sequence[int] = ()
    """What is written at the first positions of the reply, an id each, whatever the network would: the trace says how likely it
    was. Not where masks may be put in."""
    slots: Slots | None = None
    """Stretches of the reply that hold one of several patterns, where the reply does not grow."""
    priority: int = 0
    """The higher go first, into the engine and into a forward that does not hold all rows; equals take turns."""


def check_request(
    request: GenerateRequest, model: Model, tokenizer: PreTrainedTokenizerFast, mask_id: int
) -> None:
    """Raises UserError for a request that `model` cannot run."""
    num_given = len(request.prompt) + len(request.suffix)
    check_room(request.sampling, num_given, getattr(getattr(model, "config", None), "max_length", None))
    check_window(request.sampling, is_given_behind=bool(request.suffix))
    if mask_id in request.prompt or mask_id in request.suffix:
        raise UserError(f"prompt and suffix must not hold the mask token (id {mask_id})")
    check_network(model, request.sampling)
    check_network_block(request.sampling, network_block(model))
    spelled = spell_fixed(tokenizer, request.sampling)
    blocks = count_blocks(spelled, len(request.prompt), network_block(model))
    check_steps(request.sampling.steps, blocks)
    named = named_ids(spelled)
    if mask_id in named["fixed"].tolist():
        raise UserError(f"sampling: fixed must not hold the mask token (id {mask_id})")
    if mask_id in request.forced:
        raise UserError(f"the mask token (id {mask_id}) cannot be written")
    if len(request.forced) > request.sampling.gen_length or (
        request.forced and request.sampling.initial_length is not None
    ):
        raise UserError("forced tokens need a canvas that has a place for each and does not grow")
    given_ids = {"prompt": request.prompt, "suffix": request.suffix, "forced": request.forced}
    for name, given in given_ids.items():
        check_tokens(name, model, torch.tensor([*given], dtype=torch.int64))
    for name, ids in named.items():
        check_tokens(f"sampling: {name}", model, ids)
