"""What the experiments share, each on a case that can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from llada.data.tokens.shards import TokenDataset, load_unigram_counts
from llada.model.transformer import Transformer


def test_rows_are_read_as_they_were_given(script: ModuleType, tmp_path: Path):
    tokens = np.array([[0, 2, 3, 4], [0, 3, 3, 2]])
    script.write_rows(tmp_path, {"train": (tokens, np.array([1, 2])), "validation": (tokens[:1], [3])}, 5)
    train = TokenDataset(str(tmp_path), "train")
    rows = train.rows(np.arange(2))
    assert (rows.tokens == tokens).all()
    assert rows.maskable.tolist() == [[False, True, True, True], [False, False, True, True]]
    # Of what is asked for in training alone.
    assert load_unigram_counts(str(tmp_path)).tolist() == [0, 0, 2, 2, 1]
    assert TokenDataset(str(tmp_path), "validation").rows(np.arange(1)).maskable.sum() == 1


def test_what_is_kept_is_not_made_again_and_is_of_one_experiment(script: ModuleType, tmp_path: Path):
    assert script.once(tmp_path / "a" / "b.json", lambda: {"x": 1}) == {"x": 1}
    assert script.once(tmp_path / "a" / "b.json", lambda: pytest.fail("made again")) == {"x": 1}
    assert script.keep_settings(tmp_path, {"sizes": (1, 2)}) == {"sizes": [1, 2]}
    script.keep_settings(tmp_path, {"sizes": (1, 2)})
    with pytest.raises(SystemExit, match="other settings"):
        script.keep_settings(tmp_path, {"sizes": (1, 3)})


def test_the_mean_and_its_error(script: ModuleType):
    assert script.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 3**-0.5))


def test_twins_have_one_size_and_the_causal_one_writes_its_likeliest_tokens(script: ModuleType):
    sizes = {"vocab_size": 7, "row_length": 12, "d_model": 32, "num_layers": 2}
    configs = {name: script.small_network(objective, **sizes) for name, objective in script.TWINS.items()}
    assert configs["LLaDA"].num_parameters == configs["autoregressive"].num_parameters
    assert [config.causal for config in configs.values()] == [False, True]
    network = Transformer(configs["autoregressive"])
    network.init_weights(0)
    prompts = torch.tensor([[2, 3, 4], [5, 5, 2]])
    written = script.write_left_to_right(network, prompts, 5)
    whole = torch.cat([prompts, written], dim=1)
    with torch.no_grad():
        assert (network(whole)[:, 2:-1].argmax(-1) == written).all()


def test_a_twin_takes_the_rate_that_is_best_for_it_and_keeps_what_was_measured(
    script: ModuleType, tmp_path: Path
):
    tokens = np.tile([0, 2, 3, 2, 3, 2, 3, 2], (64, 1))
    prompts = np.ones(64, np.int64)
    script.write_rows(tmp_path / "data", {"train": (tokens, prompts), "validation": (tokens, prompts)}, 4)
    learning = script.Learning(num_steps=12, batch_rows=8, rates=(1e-5, 0.02), d_model=32, num_layers=1)
    twins = script.Twins(tmp_path, tmp_path / "data", 4, 8, learning)
    measured = twins.run("autoregressive", 0, lambda network, result: {"training": network.training})
    chosen = twins.choose_rate("autoregressive")
    assert chosen["rate"] == 0.02
    assert chosen["losses"][0] > chosen["losses"][1]
    assert measured["training"] is False
    assert measured["curve"] == [[12, measured["validation_loss"]]]
    assert measured["validation_loss"] < 0.7, "two letters that take turns are learned"
    again = twins.run("autoregressive", 0, lambda network, result: pytest.fail("trained again"))
    assert again == measured == json.loads((tmp_path / "runs" / "autoregressive-0.json").read_text())
    assert not list((tmp_path / "checkpoints").iterdir())
