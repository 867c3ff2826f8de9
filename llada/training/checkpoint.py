"""Training checkpoints: sharded (DCP), resumable at any number of workers, on any fsspec URL.

`<folder>/step-00001000/` holds the shards of parameters and optimizer state; `state.json` (the cursor) is written last,
so a folder without it is an interrupted write and is ignored. The data position is the step: noise and order are
functions of it.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from llada.files import filesystem, local_path, write_bytes
from llada.model.transformer import Transformer
from llada.training.parallel import world

STATE_FILE = "state.json"


def _tensors(model: Transformer, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Everything that must survive, under stable names: `model.<parameter>`, `optim.<parameter>.<slot>`."""
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, slots in optimizer.state.items():
            for slot, value in slots.items():
                tensors[f"optim.{names[id(parameter)]}.{slot}"] = value
    return tensors


def save_checkpoint(
    folder: str,
    step: int,
    model: Transformer,
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, Any],
    *,
    keep: int = 2,
) -> str:
    """Write the checkpoint of the state after `step` steps, then delete all but the newest `keep`. A collective."""
    fs, root = filesystem(folder)
    url = f"{folder.rstrip('/')}/step-{step:08d}"
    path = f"{root.rstrip('/')}/step-{step:08d}"
    if world()[0] == 0:
        if fs.exists(path):
            fs.rm(path, recursive=True)
        fs.makedirs(path, exist_ok=True)
    _barrier()
    writer = FileSystemWriter(path) if local_path(folder) else FsspecWriter(url)
    try:
        dcp.save(_tensors(model, optimizers), storage_writer=writer)
    except CheckpointException as error:  # no Exception for Python, so most handlers would miss it
        first = next(iter(error.failures.values()))[0]
        raise RuntimeError(f"cannot write the checkpoint {url}: {first}") from first
    if world()[0] == 0:
        write_bytes(f"{url}/{STATE_FILE}", json.dumps(state, indent=2).encode())
        for old in complete_checkpoints(folder)[:-keep]:
            fs.rm(f"{root.rstrip('/')}/step-{old:08d}", recursive=True)
    _barrier()
    return url


def complete_checkpoints(folder: str) -> list[int]:
    """Steps of the finished checkpoints, ascending."""
    fs, root = filesystem(folder)
    if not fs.exists(root):
        return []
    # Not a glob: the folder's own name may hold brackets or stars.
    names = [str(path).rstrip("/").split("/")[-1] for path in fs.ls(root, detail=False)]
    steps = [int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d+", name)]
    return sorted(step for step in steps if fs.exists(f"{root.rstrip('/')}/step-{step:08d}/{STATE_FILE}"))


def read_state(folder: str, step: int) -> dict[str, Any]:
    fs, root = filesystem(folder)
    with fs.open(f"{root.rstrip('/')}/step-{step:08d}/{STATE_FILE}") as file:
        return json.load(file)


def load_checkpoint(
    folder: str, step: int, model: Transformer, optimizers: list[torch.optim.Optimizer]
) -> None:
    """Restore parameters and optimizer state in place, resharding as needed. A collective."""
    _, root = filesystem(folder)
    path = f"{root.rstrip('/')}/step-{step:08d}"
    reader = (
        FileSystemReader(path)
        if local_path(folder)
        else FsspecReader(f"{folder.rstrip('/')}/step-{step:08d}")
    )
    metadata = reader.read_metadata().state_dict_metadata
    owner = {
        id(p): optimizer for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]
    }
    for name, parameter in model.named_parameters():
        prefix = f"optim.{name}."
        for key, stored in metadata.items():
            if not key.startswith(prefix):
                continue
            slots = owner[id(parameter)].state[parameter]
            shaped = getattr(stored, "size", None) == parameter.shape
            slots[key.removeprefix(prefix)] = (
                torch.zeros_like(parameter.detach()) if shaped else torch.zeros((), dtype=torch.float32)
            )
    tensors = _tensors(model, optimizers)
    missing = sorted(set(tensors) ^ set(metadata))
    if missing:
        raise ValueError(f"checkpoint {path} does not fit this model and optimizer: {missing[:5]}")
    dcp.load(tensors, storage_reader=reader)


def _barrier() -> None:
    if world()[1] > 1:
        dist.barrier()
