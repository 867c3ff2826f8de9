"""A folder of checkpoints: which there are, which are kept, how one is deleted.

`<folder>/step-00001000/` holds the shards of one. Its state.json is written last and deleted first: a folder without it is
an interrupted write or half deleted, and in either case no checkpoint.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection

from llada.files import filesystem, join

STATE_FILE = "state.json"


def checkpoint_url(folder: str, step: int) -> str:
    """Where the checkpoint of a step stands."""
    return join(folder, f"step-{step:08d}")


def complete_checkpoints(folder: str) -> list[int]:
    """Steps of the finished checkpoints, ascending."""
    fs, root = filesystem(folder)
    return [
        step for step in begun_checkpoints(folder) if fs.exists(join(checkpoint_url(root, step), STATE_FILE))
    ]


def begun_checkpoints(folder: str) -> list[int]:
    """Steps of all checkpoints, ascending."""
    fs, root = filesystem(folder)
    if not fs.exists(root):
        return []
    # Not a glob: the folder's own name may hold brackets or stars.
    names = [str(path).rstrip("/").split("/")[-1] for path in fs.ls(root, detail=False)]
    return sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d+", name))


def kept_checkpoints(steps: Collection[int], *, keep: int, keep_every: int | None) -> set[int]:
    """Those of the steps that are kept: the newest `keep`, and the first in each `keep_every` steps. (Not the multiples:
    a checkpoint that is due where a step is skipped is written behind it.)"""
    kept, last = set(sorted(steps)[-keep:]), 0
    if keep_every is not None:
        for step in sorted(steps):
            if step // keep_every > last // keep_every:
                kept.add(step)
                last = step
    return kept


def retain_checkpoints(folder: str, *, keep: int, keep_every: int | None) -> None:
    """Delete the checkpoints that are not kept, and what was left half written or half deleted before the newest."""
    complete = complete_checkpoints(folder)
    kept = kept_checkpoints(complete, keep=keep, keep_every=keep_every)
    for step in begun_checkpoints(folder):
        if complete and step < complete[-1] and step not in kept:
            delete_checkpoint(folder, step)


def delete_checkpoint(folder: str, step: int) -> None:
    """Delete one, if it is there, and whatever else stands in its place."""
    fs, root = filesystem(folder)
    path = checkpoint_url(root, step)
    for what in (join(path, STATE_FILE), path):  # the mark first: what is half deleted is no checkpoint
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            fs.rm(what, recursive=True)
