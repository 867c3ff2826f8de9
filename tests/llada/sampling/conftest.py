"""A tiny network with varied, peaked predictions."""

from collections.abc import Callable

import pytest
import torch

from llada.model.transformer import ModelConfig, Transformer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Transformer]:
    """A factory of small random networks over 23 ids of which 22 is the mask, 1 EOS and 0 padding."""

    def make(seed: int = 0, **changes: object) -> Transformer:
        shape: dict = {
            "vocab_size": 23,
            "d_model": 24,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_dim": 20,
            "max_length": 48,
            "mask_token_id": 22,
            "eos_token_id": 1,
            "pad_token_id": 0,
        }
        model = Transformer(ModelConfig(**{**shape, **changes}))
        model.init_weights(seed)
        with torch.no_grad():
            model.lm_head.weight.mul_(4)
            model.lm_head.weight[22].mul_(3)  # the mask would often be the best guess
        return model.eval()

    return make
