"""Writing checkpoints, and deleting those that a run needs no more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llada.files import filesystem
from llada.model.transformer import Transformer
from llada.training.checkpoint.folder import (
    begun_checkpoints,
    checkpoint_url,
    delete_checkpoint,
    retain_checkpoints,
)
from llada.training.checkpoint.state import Cursor, write_state
from llada.training.checkpoint.tensors import named_tensors, write_tensors
from llada.training.parallel import from_all, wait_for_all, world


def save_checkpoint(
    folder: str,
    cursor: Cursor,
    identity: Mapping[str, Any],
    model: Transformer,
    optimizers: list[torch.optim.Optimizer],
    *,
    keep: int = 2,
    keep_every: int | None = None,
) -> str:
    """Write the checkpoint of the run at `cursor`, then delete those that are not kept (see `kept_checkpoints`); its URL.
    A collective."""
    step = cursor.step
    url = checkpoint_url(folder, step)
    if world()[0] == 0:
        delete_checkpoint(folder, step)
        fs, root = filesystem(folder)
        fs.makedirs(checkpoint_url(root, step), exist_ok=True)
    wait_for_all()
    try:
        written = write_tensors(folder, step, named_tensors(model, optimizers))
    except Exception as error:
        raise RuntimeError(f"cannot write the checkpoint {url}: {error}") from error
    files = {name: entry for entries in from_all(written) for name, entry in entries.items()}
    if world()[0] == 0:
        write_state(folder, cursor, identity, files)
        retain_checkpoints(folder, keep=keep, keep_every=keep_every)
    wait_for_all()
    return url


def drop_checkpoints(folder: str, after: int) -> None:
    """Delete the checkpoints of the steps after this one. A collective."""
    wait_for_all()
    for step in begun_checkpoints(folder) if world()[0] == 0 else []:
        if step > after:
            delete_checkpoint(folder, step)
    wait_for_all()
