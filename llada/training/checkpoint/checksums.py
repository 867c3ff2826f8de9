"""Checksums of a checkpoint's files, taken while they are written: a flipped bit of a weight is a weight too."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter

from llada.files import filesystem, join
from llada.training.checkpoint.folder import checkpoint_url
from llada.training.parallel import world

_CHUNK_BYTES = 1 << 23


class _Counted:
    """A stream that is written from its beginning to its end, and the CRC-32 of what has gone through."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.size, self.crc = stream, 0, 0

    def write(self, data: Any) -> Any:
        self.size += memoryview(data).nbytes
        self.crc = zlib.crc32(data, self.crc)
        return self.stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Watched:
    """What a DCP writer of this worker writes: the checksums, and what failed.

    DCP's writing threads beside its first one lose their errors: it would call a checkpoint written that lacks files.
    """

    def __init__(self, writer: FileSystemWriter) -> None:
        self.files: dict[str, list[int]] = {}
        """{name: [bytes, CRC-32]}."""
        self.faults: list[BaseException] = []
        create = writer.fs.create_stream

        @contextlib.contextmanager
        def create_stream(path: str | os.PathLike, mode: str) -> Iterator[Any]:
            try:
                with create(path, mode) as stream:
                    counted = _Counted(stream)
                    yield counted
            except BaseException as error:
                self.faults.append(error)
                raise
            if mode == "wb":  # .metadata is written under a temporary name
                name = os.path.basename(path).removesuffix(".tmp")
                self.files[name] = [counted.size, counted.crc]

        writer.fs.create_stream = create_stream  # type: ignore[method-assign]


def find_fault(folder: str, step: int, files: Mapping[str, list[int]]) -> str | None:
    """The first of a checkpoint's files that is not as it was written, in words. Each worker looks at its share."""
    fs, root = filesystem(folder)
    rank, num_workers = world()
    for name in sorted(files)[rank::num_workers]:
        size, crc = files[name]
        path, url = (join(checkpoint_url(place, step), name) for place in (root, folder))
        if not fs.exists(path):
            return f"{url} is missing"
        if (found := fs.size(path)) != size:
            return f"{url} has {found:,} bytes instead of {size:,}"
        if _crc_of(fs, path) != crc:
            return f"{url} has another checksum than when it was written"
    return None


def _crc_of(fs: Any, path: str) -> int:
    crc = 0
    with fs.open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc
