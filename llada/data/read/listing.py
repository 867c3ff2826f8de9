"""List input files in a fixed order, one at a time: folders, globs and lists of millions of files fit in any memory.

    list_inputs(["s3://bucket/web", "books/*.jsonl.gz", "@files.txt"])   -> InputFile, ...

Files of a folder or glob come in the order of their paths (by Unicode code point), which is also the order in which S3
lists them, page by page; those of a list in the order of its lines.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from llada.data.read.formats import find_reader, reader_of, supported
from llada.data.read.parts import InputFile
from llada.errors import UserError
from llada.files import describe, filesystem, open_text, storage_errors

_STAT_THREADS = 32  # a list of files asks the store for each size; the answers take milliseconds each
_PAGE = 1000
_NEWEST_MARKS = 1 << 15


@dataclass(frozen=True)
class _Input:
    """One input as given: a file, a folder, a glob or (after "@") a list; `prefix` begins the names of its files."""

    given: str
    prefix: str
    fs: Any
    path: str
    kind: str  # "file" | "folder" | "glob" | "list"

    @property
    def root(self) -> str:
        """The folder that is walked."""
        head = re.split(r"[*?\[]", self.path)[0] if self.kind == "glob" else self.path.rstrip("/") + "/"
        return head[: head.rfind("/") + 1]


class _Marks:
    """A set of 64-bit numbers that takes 8 bytes for each: sorted arrays, each at least as long as all after it."""

    def __init__(self) -> None:
        self._newest: set[int] = set()
        self._sorted: list[np.ndarray] = []

    def add(self, mark: int) -> bool:
        """Whether it is new."""
        if mark in self._newest or any(_holds(marks, mark) for marks in self._sorted):
            return False
        self._newest.add(mark)
        if len(self._newest) == _NEWEST_MARKS:
            merged = np.fromiter(self._newest, np.uint64, len(self._newest))
            while self._sorted and len(self._sorted[-1]) <= len(merged):
                merged = np.concatenate([self._sorted.pop(), merged])
            self._sorted.append(np.sort(merged))
            self._newest.clear()
        return True


def _holds(marks: np.ndarray, mark: int) -> bool:
    """Whether sorted uint64 numbers (n,) hold one."""
    place = int(np.searchsorted(marks, np.uint64(mark)))
    return place < len(marks) and int(marks[place]) == mark


def list_inputs(inputs: Sequence[str]) -> Iterator[InputFile]:
    """The files behind files, folders (searched below), globs and "@" lists (one URL a line), in the order given.

    A file's `name` is its path from its input's last folder on, so it survives a move of the whole folder, and other
    inputs beside it; a listed file's is its URL. Files that are named twice come once. Hidden files, and files of a folder that
    are in no known format, are left out.

    Raises UserError naming the input that gives nothing readable.
    """
    opened = _open_inputs(inputs)
    # One folder or glob cannot name a file twice.
    seen = None if len(opened) == 1 and opened[0].kind != "list" else _Marks()
    for entry in opened:
        is_empty = True
        with storage_errors(entry.given):
            for path, name, size, identity in _files(entry):
                is_empty = False
                url = entry.fs.unstrip_protocol(path) if "://" in entry.given or "://" in path else path
                if seen is not None:
                    mark = int.from_bytes(hashlib.blake2b(url.encode(), digest_size=8).digest(), "little")
                    if not seen.add(mark):
                        continue
                yield InputFile(url, entry.prefix + name, size, identity)
        if is_empty:
            raise UserError(f"nothing to read in {entry.given}: file names must end in one of {supported()}")


def _open_inputs(inputs: Sequence[str]) -> list[_Input]:
    if not inputs:
        raise UserError("no --input given")
    opened: list[_Input] = []
    labels: Counter[str] = Counter()
    for given in dict.fromkeys(inputs):
        fs, path = filesystem(given.removeprefix("@"))
        there = None if given.startswith("@") else describe(given)
        if given.startswith("@"):
            kind = "list"
        elif there and there["type"] != "directory":  # before globs: a file's own name may hold brackets
            kind = "file"
        elif any(character in path for character in "*?["):
            kind = "glob"
        elif there:
            kind = "folder"
        else:
            raise UserError(f"no input at {given}: no such file, folder or match")
        root = re.split(r"[*?\[]", path)[0].rpartition("/")[0] if kind == "glob" else path.rstrip("/")
        label = os.path.basename(root)
        labels[label] += 1
        label = label if labels[label] == 1 else f"{label}#{labels[label]}"
        prefix = label if kind == "file" else "" if kind == "list" else f"{label}/"
        opened.append(_Input(given.removeprefix("@"), prefix, fs, path, kind))
    return opened


def _files(entry: _Input) -> Iterator[tuple[str, str, int | None, str]]:
    """(path, name below the input, bytes, identity) of each readable file of one input."""
    if entry.kind == "file":
        reader_of(entry.given)
        if there := describe(entry.given):
            yield entry.path, "", *_stat(there)
        return
    if entry.kind == "list":
        yield from _listed(entry)
        return
    pattern = re.compile(glob_translate(entry.path)) if entry.kind == "glob" else None
    for path, info in walk(entry.fs, entry.root.rstrip("/")):
        name = path[len(entry.root) :]
        if any(piece.startswith((".", "_")) for piece in name.split("/")):
            continue
        if pattern is not None and not pattern.fullmatch(path):
            continue
        if pattern is not None:
            reader_of(path)  # asked for by its name; in a folder, a README beside the data is no error
        elif find_reader(path) is None:
            continue
        yield path, name, *_stat(info)


def _listed(entry: _Input) -> Iterator[tuple[str, str, int | None, str]]:
    """The files named, one a line, in the text file `entry.path`."""

    def look(url: str) -> tuple[str, str, int | None, str]:
        reader_of(url)
        if there := describe(url):
            return url, url, *_stat(there)
        raise UserError(f"no file at {url}, which {entry.given} lists")

    try:
        with open_text(entry.given) as lines, ThreadPoolExecutor(_STAT_THREADS) as pool:
            urls = (line.strip() for line in lines)
            wanted = (url for url in urls if url and not url.startswith("#"))
            while page := list(islice(wanted, _PAGE)):
                yield from pool.map(look, page)
    except FileNotFoundError:
        raise UserError(f"no list at {entry.given}") from None


def _stat(info: dict[str, Any]) -> tuple[int | None, str]:
    """(bytes, what changes when the file does) from a file system's entry."""
    size = None if info["size"] is None else int(info["size"])
    etag = info.get("ETag") or info.get("etag")
    changed = info.get("mtime") if size is not None else info.get("Last-Modified")
    return size, str(etag).strip('"') if etag else f"{size}-{changed}"


def is_as_listed(file: InputFile) -> bool:
    """Whether the store has the file, and the same version of it. Raises StoreError when it does not say."""
    there = describe(file.url)
    return there is not None and _stat(there) == (file.size, file.identity)


def walk(fs: Any, root: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, entry) of every file below `root`, in the order of the paths; one folder, or one page of S3's listing,
    is held at a time."""
    if "s3" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
        yield from _walk_s3(fs, root)
        return
    try:
        entries = fs.ls(root, detail=True)
    except FileNotFoundError:
        return

    def place(entry: dict[str, Any]) -> str:
        return entry["name"] + "/" * (entry["type"] == "directory")

    for entry in sorted(entries, key=place):
        if entry["type"] == "directory":
            if not isinstance(fs, LocalFileSystem) or not os.path.islink(entry["name"]):
                yield from walk(fs, entry["name"].rstrip("/"))
        else:
            yield entry["name"], entry


def _walk_s3(fs: Any, root: str) -> Iterator[tuple[str, dict[str, Any]]]:
    bucket, _, key = root.partition("/")
    prefix = f"{key}/" if key else ""
    after: dict[str, str] = {}
    while True:
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=_PAGE, **after)
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):
                yield f"{bucket}/{item['Key']}", {"size": item["Size"], "ETag": item["ETag"]}
        if not page.get("IsTruncated"):
            return
        after = {"ContinuationToken": page["NextContinuationToken"]}
