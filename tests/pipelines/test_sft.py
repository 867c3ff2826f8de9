"""sft on a real Ray: it starts from the model it is given, learns from conversations, and refuses anything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import llada
from llada.data.tokens.shards import TokenDataset
from llada.errors import UserError
from llada.model.hf import load_state, read_config
from pipelines.sft import sft

pytestmark = pytest.mark.integration


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_state(folder, *read_config(folder))


def test_sft_starts_from_the_model_it_is_given(stages):
    before, after = weights(stages.pretrained), weights(stages.model)
    change = max(float((after[name] - before[name]).abs().max()) for name in before)
    fresh = llada.Transformer(stages.recipe.model)
    fresh.init_weights(0)
    distance = max(
        float((after[name] - p).abs().max()) for name, p in fresh.named_parameters() if name in after
    )
    assert 0 < change < distance


def test_sft_wants_conversations_and_a_checkpoint(stages, tmp_path):
    options = {"output": str(tmp_path / "out"), "cluster": stages.cluster, "progress": False}
    with pytest.raises(UserError, match="not SFT data"):
        sft(stages.recipe, model=stages.pretrained, data=stages.data, **options)
    with pytest.raises(UserError, match="no config.json"):
        sft(stages.recipe, model=str(tmp_path), data=stages.sft_data, **options)


def test_the_data_was_seen_as_sft(stages):
    assert TokenDataset(stages.sft_data).kind == "sft"
    lines = [json.loads(line) for line in Path(stages.model, "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["loss"] < 20 for line in lines)
