"""A folder of checkpoints: which are kept, and that one is no checkpoint from the first moment of its deletion on."""

from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from llada.training.checkpoint.folder import (
    begun_checkpoints,
    complete_checkpoints,
    delete_checkpoint,
    kept_checkpoints,
    retain_checkpoints,
)


def write_checkpoints(folder: str, complete: list[int], begun: list[int]) -> None:
    fs, root = fsspec.url_to_fs(folder)
    for step in [*complete, *begun]:
        path = f"{root}/step-{step:08d}"
        fs.makedirs(path, exist_ok=True)
        fs.pipe_file(f"{path}/__0_0.distcp", b"shard")
        if step in complete:
            fs.pipe_file(f"{path}/state.json", b"{}")


@pytest.mark.parametrize(
    ("steps", "keep", "keep_every", "kept"),
    [
        ([1, 2, 3, 4], 2, None, {3, 4}),
        ([1], 2, None, {1}),
        ([], 2, 5, set()),
        ([500, 1000, 1500, 2000, 2500], 1, 1000, {1000, 2000, 2500}),
        # 1200 is due at no checkpoint: the one behind it stands for it.
        ([500, 1000, 1500, 2000, 2500, 3000], 1, 1200, {1500, 2500, 3000}),
        ([999, 1003, 1999], 1, 1000, {1003, 1999}),
        ([3000, 1000, 2000], 1, 2500, {3000}),
        ([5, 10], 1, 100, {10}),
    ],
)
def test_kept_are_the_newest_and_one_of_each_so_many_steps(
    steps: list[int], keep: int, keep_every: int | None, kept: set[int]
) -> None:
    assert kept_checkpoints(steps, keep=keep, keep_every=keep_every) == kept


def test_what_is_kept_as_a_run_goes_on_is_what_would_be_kept_of_all() -> None:
    """Deleting others first must not move what is kept for good."""
    steps = [number * 70 + number % 3 for number in range(1, 60)]
    present: set[int] = set()
    for step in steps:
        present = kept_checkpoints([*present, step], keep=2, keep_every=500)
    assert present == kept_checkpoints(steps, keep=2, keep_every=500)


@pytest.mark.parametrize("store", ["local", "memory"])
def test_retention_deletes_also_what_is_half_there_before_the_newest(tmp_path: Path, store: str) -> None:
    folder = str(tmp_path) if store == "local" else f"memory://{tmp_path.name}"
    write_checkpoints(folder, complete=[1, 2, 4, 6], begun=[3, 7])
    retain_checkpoints(folder, keep=2, keep_every=2)
    assert complete_checkpoints(folder) == [2, 4, 6]
    assert begun_checkpoints(folder) == [2, 4, 6, 7]


def test_without_a_whole_one_nothing_is_deleted(tmp_path: Path) -> None:
    write_checkpoints(str(tmp_path), complete=[], begun=[1, 2])
    retain_checkpoints(str(tmp_path), keep=1, keep_every=None)
    assert begun_checkpoints(str(tmp_path)) == [1, 2]


def test_a_deletion_that_breaks_off_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoints(str(tmp_path), complete=[1, 2], begun=[])
    remove, calls = LocalFileSystem.rm, []

    def break_off(self: LocalFileSystem, path: str, **options: bool) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError("the power went")
        remove(self, path, **options)

    monkeypatch.setattr(LocalFileSystem, "rm", break_off)
    with pytest.raises(OSError, match="power"):
        delete_checkpoint(str(tmp_path), 1)
    assert begun_checkpoints(str(tmp_path)) == [1, 2]
    assert complete_checkpoints(str(tmp_path)) == [2]
    delete_checkpoint(str(tmp_path), 1)
    delete_checkpoint(str(tmp_path), 1)  # already away
    assert begun_checkpoints(str(tmp_path)) == [2]


def test_what_stands_in_the_place_of_a_checkpoint_goes_too(tmp_path: Path) -> None:
    """Someone has made folders of its files, or a file of it."""
    (tmp_path / "step-00000001" / "state.json").mkdir(parents=True)
    (tmp_path / "step-00000002").write_text("no folder")
    for step in (1, 2):
        delete_checkpoint(str(tmp_path), step)
    assert begun_checkpoints(str(tmp_path)) == []
