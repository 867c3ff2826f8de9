"""Everything below a folder, in the order of the paths, of any file system; one folder, or one page of S3's listing, is
held at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from fsspec.implementations.local import LocalFileSystem

_PAGE = 1000

EntryKind = Literal["file", "link", "broken link", "not a regular file"]


class Entry(NamedTuple):
    """One file, or a link to a file or folder, which is not followed."""

    path: str
    kind: EntryKind
    info: dict[str, Any]
    """As the file system describes it: its size, and its ETag or time."""


def walk(fs: Any, root: str, is_wanted: Callable[[str], bool]) -> Iterator[Entry]:
    """The files and links below `root`. `is_wanted` is asked for each folder before it is searched, except on S3, which
    lists files alone."""
    if "s3" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
        yield from _walk_s3(fs, root)
        return
    try:
        entries = fs.ls(root or "/", detail=True)
    except FileNotFoundError:
        return

    def place(entry: dict[str, Any]) -> str:
        return entry["name"] + "/" * (entry["type"] == "directory")

    for entry in sorted(entries, key=place):
        path = entry["name"]
        if entry["type"] == "directory":
            if is_wanted(path.rstrip("/")):
                yield from walk(fs, path.rstrip("/"), is_wanted)
        else:
            yield Entry(path, _kind(fs, entry), entry)


def _kind(fs: Any, entry: dict[str, Any]) -> EntryKind:
    if not isinstance(fs, LocalFileSystem):
        return "file"
    if entry["islink"]:
        return "link" if os.path.exists(entry["name"]) else "broken link"
    return "file" if entry["type"] == "file" else "not a regular file"


def _walk_s3(fs: Any, root: str) -> Iterator[Entry]:
    bucket, _, key = root.partition("/")
    prefix = f"{key}/" if key else ""
    after: dict[str, str] = {}
    while True:
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=_PAGE, **after)
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):
                info = {"size": item["Size"], "ETag": item["ETag"]}
                yield Entry(f"{bucket}/{item['Key']}", "file", info)
        if not page.get("IsTruncated"):
            return
        after = {"ContinuationToken": page["NextContinuationToken"]}
