"""A checkpoint's table of files: as DCP reads it, and nothing else than a table."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from llada.training.checkpoint.metadata import LocalReader, RemoteReader
from llada.training.checkpoint.tensors import write_tensors


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_it_is_what_dcp_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    write_tensors(str(tmp_path), 1, {"a": torch.zeros(3, 4, dtype=dtype), "n": torch.tensor(1, dtype=dtype)})
    folder = tmp_path / "step-00000001"
    ours, theirs = LocalReader(folder).read_metadata(), FileSystemReader(folder).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    home = f"memory://{tmp_path.name}/step-00000001"
    fsspec.filesystem("memory").pipe_file(f"{home}/.metadata", (folder / ".metadata").read_bytes())
    assert RemoteReader(home).read_metadata().state_dict_metadata == theirs.state_dict_metadata


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_would_run_is_refused(tmp_path: Path, protocol: int) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "sprung"), protocol))
    with pytest.raises(pickle.UnpicklingError, match="has no place in a checkpoint"):
        LocalReader(tmp_path).read_metadata()
    assert not (tmp_path / "sprung").exists()
    pickle.loads((tmp_path / ".metadata").read_bytes())
    assert (tmp_path / "sprung").exists()  # it was a trap
