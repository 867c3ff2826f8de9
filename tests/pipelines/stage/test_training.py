"""A training stage's folder: the picture, weights and manifest."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llada.errors import UserError
from llada.files import sha256
from llada.model.hf import load_model, save_model
from llada.model.transformer import ModelConfig, Transformer
from llada.presets import get_preset, twin
from llada.settings import flatten_settings
from llada.training.events import StepDone
from llada.training.run import RunConfig, TrainConfig, run_identity
from llada.training.trainer import TrainResult
from pipelines.stage.artifact import open_output, read_manifest
from pipelines.stage.cluster import ClusterConfig
from pipelines.stage.metrics import METRICS_FILE, PARTS, MetricsRecord
from pipelines.stage.tracking import Tracker
from pipelines.stage.training import (
    SCHEDULE,
    begin_training,
    finish_training,
    may_change,
    plot_losses,
    require_copies,
    require_sound,
    save_weights,
    settings_in_force,
    take_baseline,
    training_summary,
)


def step(number: int) -> StepDone:
    return StepDone(number, 6.5 - number / 100, 0.0008, 1.5, 2048 * number, 13734.5, 0.25)


def test_no_losses_are_an_empty_picture(tmp_path):
    assert Path(plot_losses(str(tmp_path), "nothing")).read_bytes().startswith(b"\x89PNG")


def test_weights_picture_and_manifest_complete_the_folder(tmp_path):
    config = ModelConfig(vocab_size=11, d_model=8, num_layers=1, num_heads=2, ffn_dim=12, mask_token_id=1)
    model = Transformer(config)
    model.init_weights(0)
    result = TrainResult(8, 16384, 6.5, 6.0, 5.0, 1.5, 10922.7, model)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    folder = open_output(str(tmp_path / "out"), stage="pretrain", config={"seed": 0}, inputs=[])
    save_weights(folder.url, result, RunConfig())
    record = MetricsRecord(folder.url)
    record.add(step(8))
    record.close()
    manifest = finish_training(folder, result, tokenizer=str(tokenizer), tracker=None)
    assert manifest == read_manifest(folder.url) == json.loads(Path(folder.url, "manifest.json").read_text())
    assert manifest["kind"] == "checkpoint"
    assert list(manifest["files"]) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert manifest["counts"] == {
        "num_steps": 8,
        "tokens": 16384,
        "train_loss": 6.5,
        "validation_loss": 6.0,
        "unigram_loss": 5.0,
        "seconds": 1.5,
        "tokens_per_second": 10922.7,
        "precision": "",
        "skipped_steps": 0,
        "validation_ratio": 1.2,
    }
    assert training_summary(manifest) == (
        "8 steps, 16,384 tokens, validation bound 6.0000 nats/token (1.20 × unigram)"
    )
    loaded = load_model(folder.url)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in loaded.named_parameters())
    assert Path(folder.url, "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(Path(folder.url, METRICS_FILE).read_text().splitlines()) == 1
    assert not Path(folder.url, PARTS).exists()


def test_what_ended_a_text_before_a_training_ends_it_behind(tmp_path):
    model = Transformer(
        ModelConfig(vocab_size=11, d_model=8, num_layers=1, num_heads=2, ffn_dim=12, eos_token_id=2)
    )
    model.init_weights(0)
    model.end_ids = (2, 7, 5)
    start, output = str(tmp_path / "start"), str(tmp_path / "out")
    save_model(model, start)
    result = TrainResult(8, 16384, 6.5, 6.0, 5.0, 1.5, 10922.7, model)
    save_weights(output, result, RunConfig(), start=start)
    assert load_model(output).end_ids == (2, 7, 5)


def test_a_twin_is_the_preset_with_its_objective_changed(capsys):
    recipe = get_preset("tiny")
    words = ["--data", "d", "--output", "o", "--optim.lr", "1e-3"]
    assert take_baseline(recipe, words, "pretrain") == recipe
    assert take_baseline(recipe, [*words, "--twin", "bert"], "sft") == twin(recipe, "bert")
    assert take_baseline(recipe, ["--twin=ar"], "pretrain").model.causal
    with pytest.raises(SystemExit):
        take_baseline(recipe, ["--twin", "gpt"], "pretrain")
    assert "gpt" in "".join(capsys.readouterr())


def test_settings_in_force_are_those_with_a_meaning():
    run = asdict(RunConfig())
    shown = settings_in_force({"model": {"d_model": 8}, **run})
    assert shown["model.d_model"] == 8
    assert "optim.muon_lr" not in shown
    assert shown["train.num_epochs"] == 1.0
    run["optim"]["decay_fraction"] = 0.0
    assert not {"optim.decay", "optim.final_lr_ratio"} & settings_in_force(run).keys()
    run["train"]["num_steps"], run["optim"]["optimizer"] = 7, "muon"
    shown = settings_in_force(run)
    assert "train.num_epochs" not in shown
    assert shown["optim.muon_lr"] == 3e-4
    assert not {name for name in shown if "bell" in name}
    assert {name for name in shown if name.startswith("lora.")} == {"lora.rank"}
    run["lora"]["rank"] = 8
    assert settings_in_force(run)["lora.rslora"] is False
    run["objective"]["time"]["density"] = "bell"
    assert settings_in_force(run)["objective.time.bell_center"] == 0.5
    run["objective"]["kind"] = "autoregressive"
    idle = {"objective.schedule", "objective.carry_over", "objective.time.t_min"}
    assert not idle & settings_in_force(run).keys()


def changed_setting(config: RunConfig, name: str) -> RunConfig:
    """The run with another value of a number or switch of this name."""
    group, field = name.split(".")
    settings = getattr(config, group)
    value = getattr(settings, field)
    other = not value if isinstance(value, bool) else value + (1 if isinstance(value, int) else 1e-3)
    return replace(config, **{group: replace(settings, **{field: other})})


def test_weights_that_were_damaged_on_their_way_are_no_start(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    require_sound(str(tmp_path))
    files = {name: {"sha256": sha256(str(tmp_path / name))} for name in ("config.json", "model.safetensors")}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    require_sound(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")  # people change settings
    require_sound(str(tmp_path))
    for damage in (lambda: weights.write_bytes(b"weighus"), weights.unlink):
        damage()
        with pytest.raises(
            UserError, match=r"model\.safetensors is not the file that .* lists .*: copy the folder"
        ):
            require_sound(str(tmp_path))


@pytest.mark.parametrize(
    ("workers", "sharing", "is_possible"),
    [(8, None, True), (8, 4, True), (12, 8, False), (4, 8, False), ((8, 16), 8, True)],
)
def test_copies_that_no_group_could_form_are_refused(workers, sharing, is_possible):
    """One that changes its size may have any later."""
    config, cluster = RunConfig(train=TrainConfig(shard_workers=sharing)), ClusterConfig(num_workers=workers)
    with (
        nullcontext()
        if is_possible
        else pytest.raises(UserError, match=f"shard_workers {sharing} does not divide")
    ):
        require_copies(config, cluster)


def test_a_run_may_go_on_with_whatever_is_not_its_identity():
    """What the stage lets through, the checkpoints take, and the other way round."""
    model, data = ModelConfig(vocab_size=11, d_model=8, num_layers=1, num_heads=2, ffn_dim=12), "fingerprint"
    run = RunConfig()
    settings = flatten_settings({"model": asdict(model), **asdict(run)})
    allowed = may_change({"model": asdict(model), **asdict(run)})
    assert {
        "train.micro_batch_rows",
        "train.compile",
        "train.precision",
        "optim.moments",
        "optim.weight_decay",
    } <= {*allowed}
    assert not {name for name in allowed if name.startswith(("model.", "objective."))}
    identity = run_identity(model, run, SimpleNamespace(fingerprint=data))
    numbers = [
        n for n in settings if n.startswith(("train.", "optim.")) and isinstance(settings[n], int | float)
    ]
    assert len(numbers) > 15
    for name in numbers:
        if name in ("train.rollback_lr_scale", "optim.final_lr_ratio"):
            continue  # at their limits
        same = run_identity(model, changed_setting(run, name), SimpleNamespace(fingerprint=data)) == identity
        assert same == (name in allowed or name in SCHEDULE), name


def test_changed_settings_are_tags_in_mlflow_and_its_parameters_keep_the_first_values(tmp_path):
    calls: list[tuple[str, dict]] = []

    class Told(Tracker):
        """Keeps what MLflow would be told."""

        def _put(self, call, /, **values):
            calls.append((call, values))

    def begin(**train):
        tracker = Told(f"sqlite:///{tmp_path}/unused.db", "pretrain", str(tmp_path / "out"))
        config = {"model": {"d_model": 8}, **asdict(RunConfig(train=TrainConfig(num_steps=9, **train)))}
        return begin_training(
            "pretrain", str(tmp_path / "out"), config=config, inputs=[], tracker=tracker, extend=False
        )

    begin()
    checkpoint = tmp_path / "out" / "checkpoints" / "step-00000006"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    calls.clear()
    begin(micro_batch_rows=4, compile=True)
    told = dict(calls)
    assert told["tags"]["values"] == {
        "changed.step_6": "train.compile False -> True, train.micro_batch_rows 8 -> 4"
    }
    assert not {"train.compile", "train.micro_batch_rows"} & told["params"]["values"].keys()
    assert told["params"]["values"]["train.num_steps"] == "9"
    with pytest.raises(UserError, match=r"train\.seed 0 \(now 1\)"):
        begin(seed=1)
    with pytest.raises(UserError, match=r"train\.num_steps 9 .*with --resume"):
        begin_training(
            "pretrain",
            str(tmp_path / "out"),
            config={
                "model": {"d_model": 8},
                **asdict(RunConfig(train=TrainConfig(num_steps=12, micro_batch_rows=4, compile=True))),
            },
            inputs=[],
            tracker=None,
            extend=False,
        )
