"""`llada convert`: checkpoints and token data, there and back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llada.data.tokens.shards import TokenDataset
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


@pytest.mark.integration
def test_a_registered_model_is_a_source(llada, tmp_path, golden_dir, monkeypatch):
    pytest.importorskip("mlflow")
    uri, golden = f"sqlite:///{tmp_path / 'mlflow.db'}", str(golden_dir / "llada_gqa")
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
    code, _, err = llada("convert", str(tmp_path / "corpus-train.idx"), str(tmp_path / "other"))
    assert code == 1
    assert "needs --tokenizer" in err
