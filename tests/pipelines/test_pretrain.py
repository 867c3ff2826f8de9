"""pretrain on a real Ray: what it leaves behind, exactness against the plain loop, refusals. (Crashes: runners/.)"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import llada
from llada.config import Recipe
from llada.data.tokens.manifest import load_dataset_entry
from llada.data.tokens.shards import load_unigram_counts
from llada.diffusion.embedding_noise import EmbeddingNoiseConfig
from llada.errors import UserError
from llada.model.hf import load_state, read_config, save_model
from llada.model.rotary import RopeScaling
from llada.model.transformer import Transformer
from llada.training.events import StepDone, Validated
from llada.training.parallel import full_state
from llada.training.trainer import train
from pipelines.pretrain import pretrain, pretrain_worker, start_network
from pipelines.runners.workers import WorkerHooks
from pipelines.stage.artifact import read_manifest
from pipelines.stage.cluster import ClusterConfig
from pipelines.stage.training import read_metrics, state_of

pytestmark = pytest.mark.integration


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_state(folder, *read_config(folder))


def test_a_training_folder_is_a_checkpoint_that_loads_without_ray(stages):
    for folder, stage in ((stages.pretrained, "pretrain"), (stages.model, "sft")):
        model, tokenizer = llada.load(folder)
        assert model.config.d_model == 32
        assert tokenizer is not None
        assert tokenizer.mask_token_id == model.config.mask_token_id == 1
        manifest = read_manifest(folder)
        assert (manifest["stage"], manifest["kind"]) == (stage, "checkpoint")
        assert manifest["counts"]["num_steps"] == 12
        assert manifest["files"]["model.safetensors"]["bytes"] == os.path.getsize(
            f"{folder}/model.safetensors"
        )
        assert Path(folder, "loss.png").read_bytes().startswith(b"\x89PNG")
    events = read_metrics(stages.pretrained)
    assert [event.step for event in events if isinstance(event, StepDone)] == [4, 8, 12]
    assert [event.step for event in events if isinstance(event, Validated)] == [6, 12]


def test_the_stage_equals_the_plain_loop(stages, tmp_path):
    result = train(
        stages.recipe.model,
        stages.recipe.pretrain,
        stages.data,
        checkpoints=str(tmp_path),
        unigram_counts=load_unigram_counts(stages.data),
    )
    assert result.model is not None
    trained = weights(stages.pretrained)
    for name, tensor in full_state(result.model).items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-5, atol=1e-6)  # threads may differ
    counts = read_manifest(stages.pretrained)["counts"]
    assert counts["validation_loss"] == pytest.approx(result.validation_loss, rel=1e-5)


@pytest.mark.slow  # tests/llada/training/test_parallel.py does it without Ray
def test_two_workers_equal_one(stages, tmp_path):
    output = str(tmp_path / "two")
    pretrain(
        stages.recipe,
        data=stages.data,
        output=output,
        cluster=ClusterConfig(num_workers=2),
        profile=True,
        progress=False,
    )
    assert Path(output, "profile", "trace.json.gz").stat().st_size > 0
    one, two = weights(stages.pretrained), weights(output)
    for name in one:
        # Muon's bfloat16 iteration amplifies the order of float32 sums; 1e-3 is 3 % of one update here.
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-3)
    losses = [[event.loss for event in read_metrics(folder)] for folder in (stages.pretrained, output)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_finished_folder_is_kept_and_another_config_refused(stages):
    before = os.stat(f"{stages.pretrained}/model.safetensors").st_mtime_ns
    options = {"data": stages.data, "output": stages.pretrained, "cluster": stages.cluster, "progress": False}
    assert pretrain(stages.recipe, **options) == read_manifest(stages.pretrained)
    assert os.stat(f"{stages.pretrained}/model.safetensors").st_mtime_ns == before
    other = replace(
        stages.recipe,
        pretrain=replace(stages.recipe.pretrain, optim=replace(stages.recipe.pretrain.optim, lr=1.0)),
    )
    with pytest.raises(UserError, match=r"optim\.lr"):
        pretrain(other, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 100}, "tokenised with 3[0-9]+ ids, the model has 100"),
        ({"max_length": 16}, "rows of 32 tokens, the model takes 16"),
        ({"mask_token_id": 7}, "mask id 1, the model 7"),
        ({"causal": True}, "do not go together"),
    ],
)
def test_data_that_does_not_fit_the_model_is_refused_at_once(stages, tmp_path, change, message):
    recipe = replace(stages.recipe, model=replace(stages.recipe.model, **change))
    output = str(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        pretrain(recipe, data=stages.data, output=output, cluster=stages.cluster, progress=False)
    assert not Path(output).exists()


def test_an_autoregressive_checkpoint_becomes_the_start_of_a_diffusion_one(stages, tmp_path):
    """Of a vocabulary that lacks the data's last tokens, with stretched positions; the trained folder generates."""
    size = load_dataset_entry(stages.data).vocab_size
    shape = replace(stages.recipe.model, vocab_size=size - 9, causal=True, mask_token_id=None)
    stretched = RopeScaling("yarn", factor=4.0, original_length=16)
    source = Transformer(replace(shape, qkv_bias=True, num_kv_heads=1, rope_scaling=stretched))
    source.init_weights(0)
    start, output = str(tmp_path / "start"), str(tmp_path / "out")
    save_model(source, start, layout="llama")
    recipe, entry = steps(stages.recipe, 2), load_dataset_entry(stages.data)
    objective = replace(recipe.pretrain.objective, embedding_noise=EmbeddingNoiseConfig(std=0.02, steps=2))
    recipe = replace(recipe, pretrain=replace(recipe.pretrain, objective=objective))
    network = start_network(source.config, recipe, entry)
    rows = -(-entry.vocab_size // 64) * 64
    assert network == replace(source.config, causal=False, mask_token_id=1, vocab_size=rows)
    pretrain_worker(
        network,
        recipe.pretrain,
        stages.data,
        output,
        start,
        1.0,
        WorkerHooks(lambda event: None, lambda: False, lambda phase: None),
        sampling=recipe.sampling,
    )
    trained, _ = llada.load(output)
    assert trained.config == network
    llada.generate(trained, [[5, 6]], gen_length=4, steps=2, block_length=4)
    state = state_of(start, network, mask_noise=1.0, seed=0)
    assert torch.equal(state["layers.0.q_proj.bias"][:], source.layers[0].q_proj.bias)
    moved = [(trained.state_dict()[name] - state[name][:]).abs().max() for name in state]
    assert 0 < max(moved) < 0.1  # two steps away from these weights
    options = {"data": stages.data, "cluster": stages.cluster, "model": output, "progress": False}
    with pytest.raises(UserError, match="mask_noise is for the mask of an autoregressive checkpoint"):
        pretrain(recipe, output=str(tmp_path / "more"), mask_noise=0.5, **options)


def test_what_a_checkpoint_becomes_follows_from_the_objective(stages):
    def becomes(source, kind, **changes):
        objective = replace(stages.recipe.pretrain.objective, kind=kind)
        recipe = replace(
            stages.recipe,
            model=replace(stages.recipe.model, **changes),
            pretrain=replace(stages.recipe.pretrain, objective=objective),
        )
        return start_network(source, recipe, load_dataset_entry(stages.data))

    plain = stages.recipe.model
    ar = replace(plain, causal=True, mask_token_id=None)
    assert becomes(ar, "autoregressive") == ar
    assert becomes(ar, "masked_diffusion") == plain
    assert becomes(ar, "masked_diffusion", shift=True) == replace(plain, shift=True)
    assert becomes(replace(plain, shift=True), "masked_diffusion").shift
    with pytest.raises(UserError, match=r"model\.shift is kept from an autoregressive network"):
        becomes(plain, "masked_diffusion", shift=True)
    assert becomes(ar, "block_diffusion", block_length=8) == replace(plain, block_length=8)
    assert becomes(plain, "masked_diffusion") == plain
    assert becomes(replace(plain, block_length=4), "block_diffusion").block_length == 4
    assert becomes(replace(plain, block_length=4), "block_diffusion", block_length=8).block_length == 8
    assert (
        becomes(replace(ar, mask_token_id=7), "masked_diffusion").mask_token_id == 7
    )  # which the data refuse
    with pytest.raises(UserError, match="block_length=8 is for objective.kind block_diffusion"):
        becomes(ar, "masked_diffusion", block_length=8)


def steps(recipe: Recipe, number: int, **changes: float) -> Recipe:
    run = recipe.pretrain
    longer = replace(run, train=replace(run.train, num_steps=number), optim=replace(run.optim, **changes))
    return replace(recipe, pretrain=longer)


@pytest.mark.timeout(900)
def test_a_finished_run_goes_on_to_a_new_length(stages, tmp_path, caplog):
    """It ends where a run ends that was as long from the start, when the schedules agree on the steps before."""
    output = str(tmp_path / "extended")
    options = {"data": stages.data, "cluster": stages.cluster, "progress": False}
    flat = {"warmup_steps": 2, "decay_fraction": 0.0}
    pretrain(steps(stages.recipe, 6, **flat), output=output, **options)
    with pytest.raises(UserError, match=r"train\.num_steps 6 \(now 9\); with --resume"):
        pretrain(steps(stages.recipe, 9, **flat), output=output, **options)
    with pytest.raises(UserError, match=r"optim\.lr"):  # of the same length: nothing would be trained with it
        pretrain(steps(stages.recipe, 6, **flat, lr=1e-5), output=output, extend=True, **options)
    manifest = pretrain(steps(stages.recipe, 9, **flat), output=output, extend=True, **options)
    assert "goes on behind its 6 steps" in caplog.text
    assert manifest == read_manifest(output)
    assert (manifest["counts"]["num_steps"], manifest["config"]["train"]["num_steps"]) == (9, 9)
    whole = train(
        stages.recipe.model,
        steps(stages.recipe, 9, **flat).pretrain,
        stages.data,
        checkpoints=str(tmp_path / "whole"),
        unigram_counts=load_unigram_counts(stages.data),
    )
    assert whole.model is not None
    state = full_state(whole.model)
    for name, tensor in weights(output).items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-5, atol=1e-6)  # threads may differ
    with pytest.raises(UserError, match="are at step 9, beyond a run of 7"):
        pretrain(steps(stages.recipe, 7, **flat), output=output, extend=True, **options)
    shutil.rmtree(f"{output}/checkpoints")
    with pytest.raises(UserError, match="no checkpoints any more to go on from"):
        pretrain(steps(stages.recipe, 12, **flat), output=output, extend=True, **options)


def test_pretraining_starts_from_a_checkpoint_with_its_network(stages, tmp_path):
    output = str(tmp_path / "out")
    other = replace(stages.recipe, model=replace(stages.recipe.model, d_model=64))  # is not asked
    manifest = pretrain(
        steps(other, 1, lr=1e-9, muon_lr=1e-9),
        data=stages.data,
        model=stages.pretrained,
        output=output,
        cluster=stages.cluster,
        progress=False,
    )
    assert [entry["url"] for entry in manifest["inputs"]][1] == stages.pretrained
    assert manifest["config"]["model"]["d_model"] == 32
    one, two = weights(stages.pretrained), weights(output)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6)


def test_a_network_is_asked_for_once(llada):
    words = ["pretrain", "tiny", "--data", "d", "--output", "o", "--model", "m", "--model.d-model", "64"]
    code, _, err = llada(*words)
    assert code == 1
    assert "--model m brings its own network" in err
