"""List input files in a fixed order, one at a time: folders, globs and lists of millions of files fit in any memory.

    list_inputs(["s3://bucket/web", "books/*.jsonl.gz", "@files.txt"])   -> InputFile, ...

Files of a folder or glob come in the order of their paths (by Unicode code point), which is also the order in which S3
lists them, page by page; those of a list in the order of its lines. What links lead to comes last, so that a file which
has a place of its own among the inputs keeps that place's name.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from llada.data.left_out import FilesLeftOut, leave_out, summary
from llada.data.read.formats import ending_of, find_reader, may_be_empty, reader_of, supported
from llada.data.read.globs import compile_pattern
from llada.data.read.inputs import Input, canonical_path, lines_of, open_input, open_inputs
from llada.data.read.parts import InputFile
from llada.data.read.walk import EntryKind, walk
from llada.errors import UserError
from llada.files import entry_at, filesystem, join, storage_errors

_STAT_THREADS = 32  # a list of files asks the store for each size; the answers take milliseconds each
_PAGE = 1000
_OWN = "the output itself"
_EMPTY = "empty"
_NEWEST_MARKS = 1 << 15


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


def list_inputs(
    inputs: Sequence[str], *, written: Sequence[str] = (), left_out: FilesLeftOut | None = None
) -> Iterator[InputFile]:
    """The files behind files, folders (searched below), globs and "@" lists (one URL a line), in the order given.

    A file or folder that is there is meant by its name, whatever characters that holds; else "*", "**", "?", "[ab]" and
    "{a,b}" make it a glob. A folder that matches a glob is searched like one that is given. Links are followed, to each
    folder once.

    A line of a list is what an input may be, another list too; a relative one starts from the list's own folder. Empty
    lines, and those that begin with "#", count for nothing.

    A file's `name` is its path from its input's last folder on, so it survives a move of the whole folder, and other
    inputs beside it; a listed file's is its URL, or its relative path in the list. A file that is named twice, by one
    spelling or by several, comes once.

    Args:
        inputs: as on the command line.
        written: files and folders that this run writes; nothing in them is input.
        left_out: filled, as the files come, with what is not read: files in no known format, hidden and empty ones,
            links that lead nowhere.

    Raises UserError naming the input that gives nothing readable.
    """
    listing = _Listing(inputs, written, {} if left_out is None else left_out)
    yield from listing.files()


class _Listing:
    """One pass over all inputs: what it has met so far."""

    def __init__(self, inputs: Sequence[str], written: Sequence[str], left_out: FilesLeftOut) -> None:
        self._inputs = open_inputs(inputs)
        self._own = [canonical_path(*filesystem(url)) for url in written]
        self._left_out = left_out
        self._left_out_of: dict[str, FilesLeftOut] = {}  # by what messages call the input
        self._noted = _Marks()  # of what is left out
        self._found: Counter[str] = Counter()  # files by what messages call the input
        self._links: deque[tuple[Input, str]] = deque()
        self._folders = _Marks()
        # In a store, one folder cannot name a file twice.
        is_repeatable = len(self._inputs) > 1 or self._inputs[0].kind == "list" or self._inputs[0].is_local
        self._files = _Marks() if is_repeatable else None
        self._list_folder: str | None = None

    def files(self) -> Iterator[InputFile]:
        """All files."""
        for entry in self._inputs:
            with storage_errors(entry.said):
                yield from self._input(entry)
            if not self._links:
                self._require_files(entry)
        while self._links:
            yield from self._linked(*self._links.popleft())
        for entry in self._inputs:
            self._require_files(entry)

    def _input(self, entry: Input, lists: tuple[str, ...] = ()) -> Iterator[InputFile]:
        """The files of one input, without those that links lead to; `lists`: those in which it is named."""
        if entry.kind == "list":
            yield from self._listed(entry, lists)
        elif entry.kind == "file":
            reader_of(entry.path)
            yield from self._file(entry, entry.path, "file", entry.info, canonical_path(entry.fs, entry.path))
        else:
            yield from self._below(entry, entry.root, is_link=False)

    def _listed(self, entry: Input, lists: tuple[str, ...]) -> Iterator[InputFile]:
        """The files behind the lines of a list."""
        place = canonical_path(entry.fs, entry.path)
        if place in lists:
            raise UserError(f"{entry.said}: the list names itself; take the line out")
        folder = entry.url(entry.path).rpartition("/")[0]
        if self._list_folder is None:
            self._list_folder = folder

        def opened(line: str) -> Input:
            mark, written = ("@", line[1:]) if line.startswith("@") else ("", line)
            is_relative = not (written.startswith(("/", "~/")) or "://" in written)
            url = join(folder, written) if is_relative else written
            named = open_input(mark + url, f"{url}, which {entry.said} lists")
            # The same relative path in the lists of two folders names two files.
            name = written if folder == self._list_folder or not is_relative else url
            if named.kind == "glob" and name.endswith(named.pattern):
                name = name[: len(name) - len(named.pattern)]
            elif named.kind == "glob":
                name = named.url(named.root)
            prefix = name if named.kind == "file" else name.rstrip("/") + "/" * bool(name)
            return replace(named, prefix=prefix, lists=(entry.said, *entry.lists))

        with lines_of(entry) as lines, ThreadPoolExecutor(_STAT_THREADS) as pool:
            wanted = (line for line in lines if line and not line.startswith("#"))
            while page := list(islice(wanted, _PAGE)):
                for named in pool.map(opened, page):
                    yield from self._input(named, (*lists, place))
                    if named.kind != "file" and not self._links:
                        self._require_files(named)

    def _below(self, entry: Input, folder: str, *, is_link: bool) -> Iterator[InputFile]:
        """The files in `folder`: the input's own, or one that a link in it leads to."""
        matches = _matcher(entry)
        real = canonical_path(entry.fs, folder)

        def canonical(name: str) -> str:
            return real + f"{entry.root}/{name}"[len(folder) :].rstrip("/")

        def is_hidden(name: str, *, is_folder: bool) -> bool:
            hidden = _hidden(entry, name)
            if hidden and matches(hidden if is_folder else name):
                self._leave_out(
                    entry, "hidden", hidden + "/" * (is_folder or hidden != name), canonical(hidden)
                )
            return bool(hidden)

        def is_wanted(path: str) -> bool:
            name = entry.below_root(path)
            if own := self._own_place(canonical(name)):
                self._leave_out(entry, _OWN, name, own)
                return False
            if is_hidden(name, is_folder=True):
                return False
            if is_link or (entry.is_local and entry.kind == "folder"):
                # Links may go in circles, and lead to what the walk of a folder finds anyway.
                return self._folders.add(_mark(f"{entry.said}\0{canonical(name)}")) or not is_link
            return True

        if not is_wanted(folder):
            return
        for path, kind, info in walk(entry.fs, folder, is_wanted):
            name = entry.below_root(path)
            if is_hidden(name, is_folder=False):
                continue
            if kind == "link":  # to a folder, perhaps, in which something matches
                self._links.append((entry, path))
            elif matches(name):
                yield from self._file(entry, path, kind, info, canonical(name))

    def _linked(self, entry: Input, path: str) -> Iterator[InputFile]:
        """The files that a link leads to."""
        if os.path.isdir(path):
            yield from self._below(entry, path, is_link=True)
        elif _matcher(entry)(entry.below_root(path)):
            kind: EntryKind = "file" if os.path.isfile(path) else "not a regular file"
            yield from self._file(entry, path, kind, entry.fs.info(path), os.path.realpath(path))

    def _file(
        self, entry: Input, path: str, kind: EntryKind, info: dict[str, Any], canonical: str
    ) -> Iterator[InputFile]:
        """A file, unless it is left out or came before."""
        name = entry.below_root(path)
        reason = ""
        if own := self._own_place(canonical):
            reason, canonical = _OWN, own
        elif kind != "file":
            reason = kind
        elif find_reader(path) is None:
            reason = ending_of(path)
        elif info.get("size") == 0 and may_be_empty(path):
            reason = _EMPTY
        elif not _is_utf8(path):
            reason = "name that is not UTF-8"
        if reason:
            self._leave_out(entry, reason, name, canonical)
        if reason and not (
            reason == _EMPTY and entry.kind == "file"
        ):  # who names a file is answered by its reader
            return
        self._found.update(entry.counted_as)
        if self._files is None or self._files.add(_mark(canonical + entry.chain)):
            yield InputFile(entry.url(path), entry.prefix + name, *_stat(info))

    def _own_place(self, canonical: str) -> str:
        """What of that which is being written a path lies in, or ""."""
        return next((own for own in self._own if canonical == own or canonical.startswith(f"{own}/")), "")

    def _leave_out(self, entry: Input, reason: str, name: str, canonical: str) -> None:
        """Count a file or folder that is not read, once for its place `canonical`."""
        for said in entry.counted_as:
            leave_out(self._left_out_of.setdefault(said, {}), reason, entry.prefix + name)
        if self._noted.add(_mark(canonical)):
            leave_out(self._left_out, reason, entry.prefix + name)

    def _require_files(self, entry: Input) -> None:
        """Raise UserError for an input that gave nothing."""
        if self._found[entry.said]:
            return
        left_out = self._left_out_of.get(entry.said, {})
        if entry.kind == "list" and not left_out:
            problem = "the list names no file"
        elif not left_out and entry.kind == "folder":
            problem = "the folder is empty"
        elif not left_out:
            is_there = entry.fs.isdir(entry.root or "/")
            problem = "no file and no folder matches" if is_there else f"there is no folder {entry.root}"
        elif _OWN in left_out:
            problem = "it lies in the output; choose another --output"
        else:
            problem = f"left out {summary(left_out)}"
            if any(reason.startswith("*") or reason == "no suffix" for reason in left_out):
                problem += f"; file names must end in one of {supported()}"
        raise UserError(f"nothing to read in {entry.said}: {problem}")


def _matcher(entry: Input) -> Callable[[str], object]:
    """Whether an input asks for what has this name below its root."""
    return compile_pattern(entry.pattern).fullmatch if entry.kind == "glob" else lambda name: True


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _hidden(entry: Input, name: str) -> str:
    """A name up to its first hidden piece, "" when it has none or the input asks for hidden files."""
    if any(piece.startswith((".", "_")) for piece in entry.pattern.split("/")):
        return ""
    pieces = name.split("/")
    for count, piece in enumerate(pieces, 1):
        if piece.startswith((".", "_")):
            return "/".join(pieces[:count])
    return ""


def _mark(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _stat(info: dict[str, Any]) -> tuple[int | None, str]:
    """(bytes, what changes when the file does) from a file system's entry."""
    size = None if info["size"] is None else int(info["size"])
    etag = info.get("ETag") or info.get("etag")
    changed = info.get("mtime") if size is not None else info.get("Last-Modified")
    return size, str(etag).strip('"') if etag else f"{size}-{changed}"


def is_as_listed(file: InputFile) -> bool:
    """Whether the store has the file, and the same version of it. Raises StoreError when it does not say."""
    there = entry_at(file.url)
    return there is not None and _stat(there) == (file.size, file.identity)
