"""What the words of `--input` name: a file, a folder, a glob or a list, whatever characters a name holds."""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fsspec.implementations.local import LocalFileSystem

from llada.data.read.globs import is_pattern, split_pattern
from llada.errors import UserError
from llada.files import chain_of, filesystem, open_text, with_retries


@dataclass(frozen=True)
class Input:
    """One input as given: a file, a folder, a glob or (after "@") a list."""

    said: str
    """What messages call it."""
    fs: Any
    path: str
    kind: Literal["file", "folder", "glob", "list"]
    root: str = ""
    """The folder that is walked, or the file."""
    pattern: str = ""
    """Of a glob: what is wanted below `root`."""
    info: dict[str, Any] = field(default_factory=dict)
    """Of a file, as its file system describes it."""
    prefix: str = ""
    """Begins the names of its files."""
    lists: tuple[str, ...] = ()
    """What messages call the lists that name it."""
    chain: str = ""
    """What follows the path in the URL of a file in an archive or cache: "::s3://bucket/a.zip"."""

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def counted_as(self) -> tuple[str, ...]:
        """Whose files its files are: its own, and those of the lists that name it. A list may name millions of files,
        of which nothing is kept."""
        return self.lists if self.lists and self.kind == "file" else (self.said, *self.lists)

    def below_root(self, path: str) -> str:
        """A path below the root, relative to it."""
        return path[len(self.root) + 1 :]

    def url(self, path: str) -> str:
        return path if self.is_local else self.fs.unstrip_protocol(path) + self.chain


def open_inputs(inputs: Sequence[str]) -> list[Input]:
    """The inputs, each once, with labels that tell their files apart."""
    if not inputs:
        raise UserError("no --input given")
    opened: dict[tuple[str, str], Input] = {}
    labels: Counter[str] = Counter()
    for given in inputs:
        entry = open_input(given)
        mark = (entry.kind, entry.url(entry.path))
        if mark in opened:
            continue
        label = posixpath.basename(entry.root)
        labels[label] += 1
        label = label if labels[label] == 1 else f"{label}#{labels[label]}"
        prefix = {"file": label, "list": ""}.get(entry.kind, f"{label}/")
        opened[mark] = replace(entry, prefix=prefix)
    return list(opened.values())


def open_input(given: str, said: str = "") -> Input:
    """What an input is. Raises UserError when there is nothing of that name."""
    url = given.removeprefix("@")
    said = said or url
    fs, path = filesystem(url)
    chain = chain_of(url)
    if isinstance(fs, LocalFileSystem):
        # The same folder has the same name, whatever its spelling; ".." behind a link is not the folder before it.
        path = (
            os.path.realpath(path) if ".." in path.split("/") else posixpath.normpath("/" + path.lstrip("/"))
        )
    if given.startswith("@"):
        return Input(said, fs, path, "list", path, chain=chain)
    info = _info(fs, path, said)
    if info is not None and info["type"] == "directory":
        return Input(said, fs, path, "folder", path.rstrip("/"), chain=chain)
    if info is not None and info["type"] == "other":
        raise UserError(f"cannot read {said}: it is neither a file nor a folder")
    if info is not None:
        return Input(said, fs, path, "file", path, info=info, chain=chain)
    if is_pattern(path):
        root, pattern = split_pattern(fs, path)
        return Input(said, fs, path, "glob", root, pattern, chain=chain)
    if isinstance(fs, LocalFileSystem) and os.path.islink(path):
        raise UserError(f"no input at {said}: a link that leads nowhere")
    raise UserError(f"no input at {said}: no such file or folder")


def _info(fs: Any, path: str, said: str) -> dict[str, Any] | None:
    """What a file system says of a path; None when nothing is there."""

    def look() -> dict[str, Any] | None:
        try:
            return fs.info(path)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # a glob of many alternatives is no name
                return None
            raise

    try:
        return with_retries(look, said)
    except FileNotFoundError:  # not what a store makes of every failure: that is a StoreError by now
        return None


@contextlib.contextmanager
def lines_of(entry: Input) -> Iterator[Iterator[str]]:
    """The lines of a text file, without the white space around them."""

    def stripped(stream: Iterable[str]) -> Iterator[str]:
        try:
            for line in stream:
                yield line.strip()
        except UnicodeDecodeError as error:
            raise UserError(f"the list {entry.said} is not UTF-8 text: {error.reason}") from None

    try:
        with open_text(entry.url(entry.path)) as stream:
            yield stripped(stream)
    except FileNotFoundError:
        raise UserError(f"no list at {entry.said}") from None


def canonical_path(fs: Any, path: str) -> str:
    """What is equal for all spellings of a path: it without links, or its URL."""
    if isinstance(fs, LocalFileSystem):
        return os.path.realpath(path or "/").rstrip("/")
    return fs.unstrip_protocol(path).rstrip("/")
