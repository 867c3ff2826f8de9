"""`.metadata` of a checkpoint, DCP's table of tensors and files: a pickle, which could run anything, read as the table that it
must be. (DCP reads the tensors themselves with `weights_only`.)"""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader

# Private, because torch publishes a reader and a writer of local folders only.
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

# What DCP's tables consist of, by module; and torch's types of numbers.
_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip


class _Table(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_number = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_number or name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


class LocalReader(FileSystemReader):
    """DCP's reader of a folder on this machine."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as stream:
            metadata: Metadata = _Table(stream).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class RemoteReader(LocalReader, FsspecReader):
    """DCP's reader of a folder at any fsspec URL."""
