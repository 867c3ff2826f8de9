"""A tiny network with varied, peaked predictions, and what a rule sees of such."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.candidates import Candidates

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


@pytest.fixture(scope="session")
def make_candidates() -> Callable[..., Candidates]:
    """A factory of candidates over three ids from the probabilities of their tokens, row by row."""

    def make(rows: list[list[float]], **changes: Any) -> Candidates:
        """Candidates whose tokens, all 0, have these probabilities; the next token has all but a thousandth of the rest."""
        row = torch.tensor([r for r, values in enumerate(rows) for _ in values])
        slot = torch.tensor([s for values in rows for s in range(len(values))])
        p = torch.tensor([value for values in rows for value in values], dtype=torch.float64)
        logits = torch.stack([p, (1 - p) * 0.999, (1 - p) * 0.001], dim=1).log()
        count = torch.ones(len(rows), dtype=torch.int64)
        fields: dict[str, Any] = {
            "logits": logits,
            "tokens": torch.zeros(len(row), dtype=torch.int64),
            "is_held": torch.zeros(len(row), dtype=torch.bool),
            "row": row,
            "slot": slot,
            "column": slot,
            "shape": (len(rows), int(slot.max()) + 1),
            "step": 0 * count,
            "steps": count,
            "quota": count,
            "knobs": torch.zeros(len(rows), 1, dtype=torch.float64),
            "noise_keys": torch.arange(len(row)),
            "doubt": torch.zeros(len(row), dtype=torch.float64),
            "unsure_ids": None,
        }
        return Candidates(**{**fields, **changes})

    return make
