"""sft on a real Ray: it starts from the model it is given, learns from conversations, and refuses anything else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import llada as llada_package
from llada.data.tokens.shards import TokenDataset
from llada.errors import UserError
from llada.model.hf import load_state, read_config
from llada.model.lora import LoraConfig, MergedWeights
from llada.model.peft import load_adapter
from pipelines.sft import sft

pytestmark = pytest.mark.integration


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_state(folder, *read_config(folder))


def test_sft_starts_from_the_model_it_is_given(stages):
    before, after = weights(stages.pretrained), weights(stages.model)
    change = max(float((after[name] - before[name]).abs().max()) for name in before)
    fresh = llada_package.Transformer(stages.recipe.model)
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
    losses = [line["loss"] for line in lines if line["event"] in ("step", "validation")]
    assert losses
    assert all(0 < loss < 20 for loss in losses)


def test_adapters_are_trained_and_merged(stages, llada, tmp_path):
    """The folder is the base with its adapters, which stand in it too; and what `convert` makes of those is the same."""
    output, again = str(tmp_path / "out"), str(tmp_path / "again")
    lora = LoraConfig(rank=4, targets=("v_proj", "down_proj"))
    recipe = replace(stages.recipe, sft=replace(stages.recipe.sft, lora=lora))
    run = {"model": stages.pretrained, "data": stages.sft_data, "output": output, "cluster": stages.cluster}
    manifest = sft(recipe, **run, progress=False)
    assert manifest["config"]["lora"]["rank"] == 4
    base, merged = weights(stages.pretrained), weights(output)
    adapters, scale = load_adapter(Path(output, "adapter"), *read_config(stages.pretrained))
    expected = MergedWeights(base, adapters, scale)
    changed = {name for name, weight in merged.items() if not torch.equal(weight, base[name])}
    assert changed == {f"layers.{i}.{name}.weight" for i in range(2) for name in lora.targets}
    assert all(torch.equal(weight, expected[name]) for name, weight in merged.items())
    model, tokenizer = llada_package.load(output)
    assert tokenizer is not None
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).isfinite().all()
    assert llada("convert", stages.pretrained, again, "--merge", f"{output}/adapter")[0] == 0
    assert all(torch.equal(weight, merged[name]) for name, weight in weights(again).items())
    with pytest.raises(UserError, match=r"already holds other work: made with lora.rank 4 \(now None\)"):
        sft(stages.recipe, **run, progress=False)
