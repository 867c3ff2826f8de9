"""What /v1/models says of the model that is served: its facts, and what a request gets that does not choose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llada.sampling.config import SamplingConfig, request_knobs

if TYPE_CHECKING:
    from llada.model.transformer import ModelConfig


def model_facts(config: ModelConfig, sampling: SamplingConfig) -> dict[str, Any]:
    """Fields of the model's card beside OpenAI's own; `defaults` has every field of a request that sets a knob."""
    return {
        "context_length": config.max_length,
        "vocab_size": config.vocab_size,
        "num_parameters": config.num_parameters,
        "mask_token_id": config.mask_token_id,
        "eos_token_id": config.eos_token_id,
        "defaults": {
            "max_tokens": sampling.gen_length,
            **{knob.name: getattr(sampling, knob.name) for knob in request_knobs()},
        },
    }
