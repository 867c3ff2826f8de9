"""Checksums of files as they are written: equal to those of what lies there; and no error of a writing thread is lost."""

import zlib
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from llada.training.checkpoint.checksums import find_fault
from llada.training.checkpoint.tensors import write_tensors


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"model.{number}": torch.randn(7, 5, generator=generator) for number in range(9)}


@pytest.mark.parametrize("store", ["local", "memory"])
def test_checksums_are_those_of_the_files(tmp_path: Path, store: str) -> None:
    folder = str(tmp_path) if store == "local" else f"memory://{tmp_path.name}"
    fs, root = fsspec.url_to_fs(folder)
    fs.makedirs(f"{root}/step-00000003")
    files = write_tensors(folder, 3, tensors())
    found = {path.rsplit("/", 1)[1]: fs.cat_file(path) for path in fs.find(root)}
    assert files == {name: [len(data), zlib.crc32(data)] for name, data in found.items()}
    # One file at a time onto a disk, several side by side into a store.
    assert sorted(files) == [".metadata", *(f"__0_{n}.distcp" for n in range(1 if store == "local" else 4))]
    assert find_fault(folder, 3, files) is None
    assert find_fault(folder, 3, {**files, "__1_0.distcp": [1, 2]}) == (
        f"{folder}/step-00000003/__1_0.distcp is missing"
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("broken", range(4))
def test_a_write_that_fails_on_any_thread_fails_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    """DCP joins its writing threads without asking what became of them."""
    opened = MemoryFileSystem.open

    def refuse(self: MemoryFileSystem, path: str, mode: str = "rb", **options: Any) -> Any:
        if path.endswith(f"__0_{broken}.distcp"):
            raise ConnectionResetError(104, "reset by peer")
        return opened(self, path, mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "open", refuse)
    with pytest.raises(ConnectionResetError):
        write_tensors(f"memory://{tmp_path.name}", 3, tensors())
