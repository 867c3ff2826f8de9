"""pretrain and sft on a real Ray: what they leave behind, exactness against the plain loop, crashes, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

import llada
from llada.config import Recipe
from llada.data.tokens.shards import TokenDataset, load_unigram_counts
from llada.errors import UserError
from llada.model.hf import load_state, read_config
from llada.settings import to_json
from llada.training.trainer import train
from pipelines.prepare import prepare
from pipelines.pretrain import pretrain
from pipelines.runners.workers import read_metrics
from pipelines.sft import sft
from pipelines.stage.artifact import read_manifest
from pipelines.stage.cluster import ClusterConfig

REPOSITORY = Path(__file__).resolve().parents[2]
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
    assert [e["step"] for e in events if e["event"] == "step"] == [4, 8, 12]
    assert [e["step"] for e in events if e["event"] == "validation"] == [6, 12]


def test_the_stage_equals_the_plain_loop(stages, tmp_path):
    result = train(
        stages.recipe.model,
        stages.recipe.pretrain,
        stages.data,
        checkpoints=str(tmp_path),
        unigram_counts=load_unigram_counts(stages.data),
    )
    assert result.state is not None
    trained = weights(stages.pretrained)
    for name, tensor in result.state.items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-5, atol=1e-6)  # threads may differ
    counts = read_manifest(stages.pretrained)["counts"]
    assert counts["validation_loss"] == pytest.approx(result.validation_loss, rel=1e-5)


def test_sft_starts_from_the_model_it_is_given(stages):
    before, after = weights(stages.pretrained), weights(stages.model)
    change = max(float((after[name] - before[name]).abs().max()) for name in before)
    fresh = llada.Transformer(stages.recipe.model)
    fresh.init_weights(0)
    distance = max(
        float((after[name] - p).abs().max()) for name, p in fresh.named_parameters() if name in after
    )
    assert 0 < change < distance


@pytest.mark.slow  # tests/llada/training/test_workers.py does it without Ray
def test_two_workers_equal_one(stages, tmp_path):
    output = str(tmp_path / "two")
    pretrain(
        stages.recipe, data=stages.data, output=output, cluster=ClusterConfig(num_workers=2), progress=False
    )
    one, two = weights(stages.pretrained), weights(output)
    for name in one:
        # Muon's bfloat16 iteration amplifies the order of float32 sums; 1e-3 is 3 % of one update here.
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-3)
    losses = [[e["loss"] for e in read_metrics(folder)] for folder in (stages.pretrained, output)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def longer(recipe: Recipe) -> Recipe:
    """60 steps with a checkpoint every 5: long enough to be killed in between."""
    train_config = replace(recipe.pretrain.train, num_steps=60, checkpoint_every=5)
    return replace(recipe, pretrain=replace(recipe.pretrain, train=train_config))


@pytest.fixture(scope="module")
def undisturbed(stages, tmp_path_factory) -> str:
    """The folder of a run of `longer` that nothing disturbed."""
    output = str(tmp_path_factory.mktemp("undisturbed") / "out")
    pretrain(longer(stages.recipe), data=stages.data, output=output, cluster=stages.cluster, progress=False)
    return output


def assert_same_run(output: str, undisturbed: str) -> None:
    one, two = weights(undisturbed), weights(output)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [e["loss"] for e in read_metrics(output)] == [e["loss"] for e in read_metrics(undisturbed)]


def checkpoints(output: str) -> list[Path]:
    return list(Path(output, "checkpoints").glob("step-*/state.json"))


def test_a_killed_worker_changes_nothing(stages, undisturbed, tmp_path):
    """SIGKILL in the middle: Ray starts the worker again, the loop goes on from its checkpoint, the weights are equal."""
    output = str(tmp_path / "killed")
    victims: list[int] = []

    def kill_once() -> None:
        worker = None
        for _ in range(3000):
            if worker is None:  # looked for first: going through all processes takes long on a busy machine
                found = psutil.Process().children(recursive=True)
                worker = next((p for p in found if "RayTrainWorker" in " ".join(_command(p))), None)
            elif checkpoints(output):
                os.kill(worker.pid, signal.SIGKILL)
                victims.append(worker.pid)
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_once)
    killer.start()
    pretrain(longer(stages.recipe), data=stages.data, output=output, cluster=stages.cluster, progress=False)
    killer.join()
    assert victims, "the run ended before the worker could be killed"
    assert_same_run(output, undisturbed)


def test_a_killed_driver_takes_its_ray_along_and_the_same_command_goes_on(stages, undisturbed, tmp_path):
    """SIGKILL of the process that the user started, with a Ray of its own; then the same command again."""
    output, recipe = str(tmp_path / "killed"), tmp_path / "recipe.json"
    recipe.write_text(to_json(longer(stages.recipe)))
    command = [sys.executable, "-m", "pipelines.pretrain", str(recipe), "--data", stages.data]
    command += ["--output", output, "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    with open(tmp_path / "log", "wb") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, cwd=REPOSITORY)
        started: list[psutil.Process] = []
        try:
            for _ in range(2400):
                if checkpoints(output) or driver.poll() is not None:
                    break
                time.sleep(0.05)
            assert driver.poll() is None, (tmp_path / "log").read_text()
            # Ray's two agents end by themselves too, but only some time after they miss their raylet.
            children = psutil.Process(driver.pid).children(recursive=True)
            started = [p for p in children if "Agent" not in " ".join(_command(p))]
        finally:
            driver.kill()
            driver.wait()
    assert checkpoints(output)
    assert not Path(output, "manifest.json").exists()
    _, left = psutil.wait_procs(started, timeout=60)
    assert not left, f"still running: {[p.pid for p in left]}"
    pretrain(longer(stages.recipe), data=stages.data, output=output, cluster=stages.cluster, progress=False)
    assert_same_run(output, undisturbed)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A file system of 1 MB of its own, and a function that sets its size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
    try:
        yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_stops_training_with_one_line_and_nothing_is_lost(
    stages, undisturbed, tmp_path, small_disk
):
    disk, resize = small_disk
    options = {"data": stages.data, "output": str(disk / "out"), "cluster": stages.cluster, "progress": False}
    with pytest.raises(UserError, match=f"no space left while writing {disk}/out"):
        pretrain(longer(stages.recipe), **options)
    assert not Path(options["output"], "manifest.json").exists()
    resize("256m")
    pretrain(longer(stages.recipe), **options)
    assert_same_run(options["output"], undisturbed)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


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
    assert not Path(output, "manifest.json").exists()


def test_a_damaged_shard_that_one_worker_reads_ends_the_run_with_its_name(stages, corpus, tmp_path):
    """The other worker waits for it in a collective: nothing must hang, and nothing be tried again."""
    data = str(tmp_path / "data")
    config = replace(stages.recipe.prepare, rows_per_shard=4)
    prepare(config, inputs=[str(corpus / "text.jsonl")], output=data, cluster=stages.cluster, progress=False)
    shard = sorted(Path(data, "train").iterdir())[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{shard.name} has .* bytes instead of"):
        pretrain(
            longer(stages.recipe),
            data=data,
            output=str(tmp_path / "out"),
            cluster=ClusterConfig(num_workers=2),
            progress=False,
        )


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
