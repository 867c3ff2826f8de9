"""Checkpoints: interrupted ones are ignored, another run's refused, and older ones go on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llada.data.tokens.manifest import ShardEntry, read_index, write_index
from llada.errors import UserError
from llada.training.checkpoint import complete_checkpoints


def assert_equal_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_interrupted_checkpoints_are_ignored_and_old_ones_deleted(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    configs = make_config(checkpoint_every=1, keep_checkpoints=2)
    home = tmp_path / "run [a] *"  # no pattern characters in a folder's name may hide its checkpoints
    whole = run_here(configs, pretrain_folder, tmp_path / "whole")
    run_here(configs, pretrain_folder, home, stop_at=4)
    assert complete_checkpoints(str(home)) == [3, 4]
    (home / "step-00000004" / "state.json").unlink()
    assert complete_checkpoints(str(home)) == [3]
    resumed = run_here(configs, pretrain_folder, home)
    assert resumed.events[0].first_step == 3
    assert_equal_weights(resumed.result.state, whole.result.state)
    assert complete_checkpoints(str(home)) == [5, 6]
    assert not [path for path in home.glob("**/*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ffn_dim": 32}, "model"),
        ({"seed": 1}, "seed"),
        ({"schedule": "loglinear"}, "objective"),
        ({"optimizer": "muon"}, "optimizer"),
        ({"global_batch_tokens": 64}, "global_batch_tokens"),
    ],
    ids=str,
)
def test_checkpoints_of_another_run_are_refused(
    make_config: Callable,
    run_here: Callable,
    pretrain_folder: Any,
    tmp_path: Path,
    change: dict[str, Any],
    named: str,
) -> None:
    run_here(make_config(), pretrain_folder, tmp_path, stop_at=1)
    with pytest.raises(UserError, match=rf"another run \({named} differ"):
        run_here(make_config(**change), pretrain_folder, tmp_path)
    # What may change: the rates, the micro-batch, the length of the run.
    run = run_here(make_config(lr=0.001, micro_batch_rows=2, num_steps=3), pretrain_folder, tmp_path)
    assert run.result.num_steps == 3


def test_other_data_is_refused(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    run_here(make_config(), pretrain_folder, tmp_path / "run", stop_at=1)
    folder = shutil.copytree(pretrain_folder.url, tmp_path / "copy")
    shards = [ShardEntry("train", **row) for row in read_index(pretrain_folder.url, "train").to_pylist()]
    write_index(f"{folder}/train.parquet", reversed(shards))
    moved = type(pretrain_folder)(str(folder), pretrain_folder.counts)
    with pytest.raises(UserError, match=r"another run \(data differ"):
        run_here(make_config(), moved, tmp_path / "run")


def test_older_checkpoints_go_on_though_a_setting_was_renamed(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    """What is `objective.kind` now, they call `objective.objective`."""
    configs = make_config()
    whole = run_here(configs, pretrain_folder, tmp_path / "whole")
    run_here(configs, pretrain_folder, tmp_path / "old", stop_at=3)
    file = tmp_path / "old" / "step-00000003" / "state.json"
    state = json.loads(file.read_text())
    kind = state["identity"]["objective"].pop("kind")
    state["identity"]["objective"] = {"objective": kind, **state["identity"]["objective"]}
    file.write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"another run \(model, objective differ"):
        run_here(make_config(kind="autoregressive", causal=True), pretrain_folder, tmp_path / "old")
    resumed = run_here(configs, pretrain_folder, tmp_path / "old")
    assert resumed.events[0].first_step == 3
    assert_equal_weights(resumed.result.state, whole.result.state)


def test_a_checkpoint_without_its_tensors_is_refused_with_a_remedy(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    """Its state.json says the same run, its shards are another network's."""
    run_here(make_config(), pretrain_folder, tmp_path / "run", stop_at=1)
    run_here(make_config(num_layers=1), pretrain_folder, tmp_path / "other", stop_at=1)
    ours, theirs = (tmp_path / name / "step-00000001" for name in ("run", "other"))
    state = (ours / "state.json").read_bytes()
    shutil.copytree(theirs, ours, dirs_exist_ok=True)
    (ours / "state.json").write_bytes(state)
    with pytest.raises(UserError, match=r"step-00000001 does not fit .*layers.1.*delete it"):
        run_here(make_config(), pretrain_folder, tmp_path / "run")
