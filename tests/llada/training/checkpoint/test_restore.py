"""How a run begins: interrupted and damaged checkpoints are passed over, another run's refused, older ones go on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import Tensor

from llada.data.tokens.manifest import ShardEntry, read_index, write_index
from llada.errors import UserError
from llada.training.checkpoint.folder import complete_checkpoints
from llada.training.events import CheckpointSkipped


def assert_equal_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def without_checksums(file: Path) -> dict[str, Any]:
    """A state.json as older checkpoints have it."""
    state = json.loads(file.read_text())
    return {key: value for key, value in state.items() if key not in ("files", "checksum")}


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
    assert_equal_weights(resumed.state, whole.state)
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
    state = without_checksums(file)
    kind = state["identity"]["objective"].pop("kind")
    state["identity"]["objective"] = {"objective": kind, **state["identity"]["objective"]}
    file.write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"another run \(model, objective differ"):
        run_here(make_config(kind="autoregressive", causal=True), pretrain_folder, tmp_path / "old")
    resumed = run_here(configs, pretrain_folder, tmp_path / "old")
    assert resumed.events[0].first_step == 3
    assert_equal_weights(resumed.state, whole.state)


def test_a_checkpoint_without_its_tensors_is_refused_with_a_remedy(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    """Its state.json says the same run, its shards are another network's."""
    run_here(make_config(), pretrain_folder, tmp_path / "run", stop_at=1)
    run_here(make_config(num_layers=1), pretrain_folder, tmp_path / "other", stop_at=1)
    ours, theirs = (tmp_path / name / "step-00000001" for name in ("run", "other"))
    state = without_checksums(ours / "state.json")
    shutil.copytree(theirs, ours, dirs_exist_ok=True)
    (ours / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"step-00000001 does not fit .*layers.1.*delete it"):
        run_here(make_config(), pretrain_folder, tmp_path / "run")


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "flipped": flip,
    "other": lambda data: b"{}",
    "garbage": lambda data: b"\x00\xff" * 40,
}


def inflict(file: Path, damage: str) -> None:
    damaged = DAMAGE[damage](file.read_bytes())
    if damaged is None:
        file.unlink()
    else:
        file.write_bytes(damaged)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["state.json", ".metadata", "__0_0.distcp"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(
    make_config: Callable,
    run_here: Callable,
    pretrain_folder: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: str,
) -> None:
    configs = make_config(checkpoint_every=2, keep_checkpoints=2)
    whole = run_here(configs, pretrain_folder, tmp_path / "whole")
    home = tmp_path / "home"
    run_here(configs, pretrain_folder, home, stop_at=4)
    inflict(home / "step-00000004" / name, damage)
    resumed = run_here(configs, pretrain_folder, home)
    start, skipped = resumed.events[:2]
    assert start.first_step == 2
    assert isinstance(skipped, CheckpointSkipped)
    assert skipped.step == 4
    assert f"step-00000004/{name}" in skipped.reason or f"has no {name}" in skipped.reason
    (line,) = [record.message for record in caplog.records if "step-00000004" in record.message]
    assert line == f"{skipped.reason}: going on from step 2"
    assert_equal_weights(resumed.state, whole.state)
    assert resumed.losses == whole.losses[2:]


@pytest.mark.parametrize(
    ("name", "damage"),
    # A flipped bit of a weight is a weight: hence the checksums.
    [(".metadata", damage) for damage in DAMAGE] + [("__0_0.distcp", d) for d in DAMAGE if d != "flipped"],
)
def test_older_checkpoints_without_checksums_are_passed_over_too(
    make_config: Callable,
    run_here: Callable,
    pretrain_folder: Any,
    tmp_path: Path,
    name: str,
    damage: str,
) -> None:
    configs = make_config(checkpoint_every=2, keep_checkpoints=2)
    run_here(configs, pretrain_folder, tmp_path, stop_at=4)
    for step in (2, 4):
        file = tmp_path / f"step-0000000{step}" / "state.json"
        file.write_text(json.dumps(without_checksums(file)))
    inflict(tmp_path / "step-00000004" / name, damage)
    resumed = run_here(configs, pretrain_folder, tmp_path)
    assert resumed.events[0].first_step == 2
    assert "step-00000004" in resumed.events[1].reason


def test_a_damaged_checkpoint_on_a_remote_store_is_passed_over(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    fs, home = fsspec.filesystem("memory"), f"memory://{tmp_path.name}"
    configs = make_config(checkpoint_every=2, keep_checkpoints=2)
    whole = run_here(configs, pretrain_folder, tmp_path / "whole")
    run_here(configs, pretrain_folder, home, stop_at=4)
    shard = f"{home}/step-00000004/__0_0.distcp"
    fs.pipe_file(shard, flip(fs.cat_file(shard)))
    resumed = run_here(configs, pretrain_folder, home)
    assert resumed.events[1].reason == f"{shard} has another checksum than when it was written"
    assert_equal_weights(resumed.state, whole.state)


def test_when_no_checkpoint_is_whole_one_line_says_so(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    """To train from the start would throw the run away in silence."""
    configs = make_config(checkpoint_every=2, keep_checkpoints=2)
    run_here(configs, pretrain_folder, tmp_path, stop_at=4)
    for step in (2, 4):
        inflict(tmp_path / f"step-0000000{step}" / "__0_0.distcp", "cut")
    with pytest.raises(
        UserError, match=r"no checkpoint in .* is whole \(.*distcp has .* delete that folder"
    ) as raised:
        run_here(configs, pretrain_folder, tmp_path)
    assert "\n" not in str(raised.value)


def test_a_run_that_is_shorter_than_its_checkpoints_is_refused(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    run_here(make_config(num_steps=4), pretrain_folder, tmp_path)
    with pytest.raises(UserError, match="are at step 4, beyond a run of 3"):
        run_here(make_config(num_steps=3), pretrain_folder, tmp_path)
    assert run_here(make_config(num_steps=5), pretrain_folder, tmp_path).events[0].first_step == 4
