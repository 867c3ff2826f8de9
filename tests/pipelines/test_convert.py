"""`llada convert`: checkpoints and token data, there and back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llada import load
from llada.data.tokens.shards import TokenDataset
from llada.model.hf import load_state, read_config, save_model
from llada.model.lora import LoraConfig, adapted_linears
from llada.model.peft import save_adapter
from llada.model.transformer import ModelConfig, Transformer
from pipelines.stage.delivery import Delivery


def test_convert_both_ways(llada, tmp_path, golden_dir):
    golden = golden_dir / "llada_gqa"
    assert llada("convert", str(golden), str(tmp_path / "ours"))[0] == 0
    assert llada("convert", str(tmp_path / "ours"), str(tmp_path / "back"))[0] == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    expected = json.loads((golden / "config.json").read_text())
    expected.pop("transformers_version")  # of the program that wrote it
    assert config == expected
    code, _, err = llada("convert", str(golden), str(tmp_path / "ours"))
    assert code == 1
    assert "not empty" in err


def test_an_autoregressive_checkpoint_gets_a_mask(llada, tmp_path):
    """In the network and in the tokenizer, so that it generates as it is."""
    shape = {"d_model": 8, "num_layers": 1, "num_heads": 2, "ffn_dim": 8, "eos_token_id": 2}
    network = Transformer(ModelConfig(vocab_size=64, causal=True, **shape))
    network.init_weights(0)
    save_model(network, tmp_path / "ar", layout="llama")
    letters = {chr(97 + i): i for i in range(20)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(letters, []))).save_pretrained(
        tmp_path / "ar"
    )
    code, _, err = llada("convert", str(tmp_path / "ar"), str(tmp_path / "no"), "--mask-noise", "0.5")
    assert (code, "give --mask-token-id" in err) == (1, True)
    code, _, err = llada("convert", str(tmp_path / "ar"), str(tmp_path / "no"), "--shift")
    assert (code, "give --mask-token-id" in err) == (1, True)
    code, _, err = llada("convert", str(tmp_path / "ar"), str(tmp_path / "no"), "--mask-token-id", "30")
    assert (code, "no token with the id 30; the next that it could give the mask is 20" in err) == (1, True)
    code, _, err = llada("convert", str(tmp_path / "ar"), str(tmp_path / "start"), "--mask-token-id", "20")
    assert code == 0, err
    model, tokenizer = load(tmp_path / "start")
    assert (model.config.mask_token_id, model.config.causal) == (20, False)
    assert tokenizer.mask_token_id == 20
    assert not torch.equal(model.embed.weight[20], network.embed.weight[20])
    assert torch.equal(model.embed.weight[:20], network.embed.weight[:20])


def test_an_adapter_is_merged_in_the_layout_of_its_base(llada, tmp_path, golden_dir):
    golden, adapter, out = golden_dir / "llada_gqa", tmp_path / "adapter", tmp_path / "merged"
    network, layout = read_config(golden)
    config = LoraConfig(rank=2, targets=("down_proj",))
    matrices = {
        f"{name}.lora_{matrix}": torch.full(shape, 0.1)
        for name, (rows, columns) in adapted_linears(config, network).items()
        for matrix, shape in (("A", (2, columns)), ("B", (rows, 2)))
    }
    save_adapter(adapter, matrices, config, network, layout=layout, base=str(golden))
    assert llada("convert", str(golden), str(out), "--merge", str(adapter))[0] == 0
    assert json.loads((out / "config.json").read_text())["model_type"] == "llada"
    before, after = load_state(golden, network, layout), load_state(out, *read_config(out))
    for name, weight in after.items():
        added = 0.04 if "down_proj" in name else 0.0  # two by 0.1 · 0.1, twice
        torch.testing.assert_close(weight, before[name] + added, rtol=1e-6, atol=1e-6)
    code, _, err = llada("convert", str(golden), str(tmp_path / "other"), "--merge", str(golden))
    assert code == 1
    assert "is no adapter: it has no adapter_config.json" in err
    assert not (tmp_path / "other").exists()


@pytest.mark.integration
def test_a_registered_model_is_a_source(llada, tmp_path, tracking_uri, golden_dir, monkeypatch):
    pytest.importorskip("mlflow")
    uri, golden = tracking_uri, str(golden_dir / "llada_gqa")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    delivery = Delivery(uri, str(tmp_path / "run"))
    delivery.open("a run", {})
    delivery(("model", {"name": "tiny-sft", "url": golden, "step": 3}))
    code, out, err = llada("convert", "models:/tiny-sft/1", str(tmp_path / "ours"))
    assert (code, out.startswith(f"{tmp_path}/ours: ")) == (0, True), err
    code, _, err = llada("convert", "models:/tiny-sft@nobody", str(tmp_path / "other"))
    assert code == 1
    assert err.startswith(f"llada convert: no models:/tiny-sft@nobody in MLflow at {uri}: ")


@pytest.mark.integration
def test_megatron_there_and_back(llada, tmp_path, stages):
    """A prepared folder to .idx/.bin and back: the same rows."""
    code, out, err = llada("convert", stages.data, str(tmp_path / "corpus"))
    assert code == 0, err
    assert "corpus-train.idx: " in out
    back = str(tmp_path / "back")
    arguments = ["--tokenizer", f"{stages.data}/tokenizer", "--row-length", "32"]
    code, _, err = llada("convert", str(tmp_path / "corpus-train.idx"), back, *arguments)
    assert code == 0, err
    one, two = TokenDataset(stages.data), TokenDataset(back)
    rows = np.arange(len(two))
    assert two.lengths(rows).sum() == one.lengths(np.arange(len(one))).sum()
    assert np.array_equal(two.rows(rows[:-1]).tokens, one.rows(rows[:-1]).tokens)
    code, _, err = llada("convert", stages.data, str(tmp_path / "other"), "--merge", stages.model)
    assert code == 1
    assert "--merge is for checkpoints" in err
    code, _, err = llada("convert", str(tmp_path / "corpus-train.idx"), str(tmp_path / "other"))
    assert code == 1
    assert "needs --tokenizer" in err
