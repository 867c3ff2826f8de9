"""Training checkpoints: sharded (DCP), resumable at any number of workers, on any fsspec URL.

`<folder>/step-00001000/` holds the shards of parameters and optimizer state; `state.json` (the run's identity and its
cursor) is written last, so a folder without it is an interrupted write and is ignored. The data position is the step:
noise and order are functions of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter

# Private, because torch publishes a reader and a writer of local folders only.
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from llada.errors import UserError
from llada.files import filesystem, local_path, write_bytes
from llada.model.transformer import Transformer, copy_full_
from llada.training.parallel import world

STATE_FILE = "state.json"


@dataclass(frozen=True)
class Cursor:
    """Where a run is: all that a checkpoint holds beside tensors. The data position is the step."""

    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Trained on so far."""
    seconds: float = 0.0
    """Spent so far, attempts before this one included."""
    train_loss: float = float("nan")
    """Last logged, nats per token."""
    interval_loss: float = 0.0
    """Summed since then."""
    interval_steps: int = 0


def restore(
    folder: str,
    identity: Mapping[str, Any],
    model: Transformer,
    optimizers: list[torch.optim.Optimizer],
    *,
    initial_state: Mapping[str, Tensor] | None,
    seed: int,
) -> Cursor:
    """Fill the network (and optimizers) from the newest checkpoint, or else the initial weights, or else the seed.

    Args:
        identity: JSON values of what must not change when a run goes on, by the name of what it is.
        initial_state: our parameter names -> full tensors, the same on every worker.

    Raises:
        UserError: the checkpoints are another run's, or do not fit the network and its optimizers.
    """
    steps = complete_checkpoints(folder)
    if steps:
        state = read_state(folder, steps[-1])
        stored = state.pop("identity")
        different = sorted(key for key in identity if stored.get(key) != identity[key])
        if different:
            raise UserError(
                f"the checkpoints in {folder} are of another run ({', '.join(different)} differ): "
                "choose another output folder"
            )
        load_checkpoint(folder, steps[-1], model, optimizers)
        return Cursor(**state)
    if initial_state is None:
        model.init_weights(seed)
    else:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                copy_full_(parameter, initial_state[name])
    return Cursor()


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
    cursor: Cursor,
    identity: Mapping[str, Any],
    model: Transformer,
    optimizers: list[torch.optim.Optimizer],
    *,
    keep: int = 2,
) -> str:
    """Write the checkpoint of the run at `cursor`, then delete all but the newest `keep`; its URL. A collective."""
    step = cursor.step
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
        write_bytes(
            f"{url}/{STATE_FILE}", json.dumps({"identity": identity, **asdict(cursor)}, indent=2).encode()
        )
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
    """What a checkpoint's state.json holds: "identity" and the fields of `Cursor`."""
    fs, root = filesystem(folder)
    with fs.open(f"{root.rstrip('/')}/step-{step:08d}/{STATE_FILE}") as file:
        state = json.load(file)
    objective = state["identity"]["objective"]
    if "objective" in objective:  # older checkpoints call its kind so
        objective["kind"] = objective.pop("objective")
    return state


def load_checkpoint(
    folder: str, step: int, model: Transformer, optimizers: list[torch.optim.Optimizer]
) -> None:
    """Restore parameters and optimizer state in place, resharding as needed. A collective. Raises UserError."""
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
        raise UserError(
            f"checkpoint {path} does not fit this model and optimizer ({', '.join(missing[:5])}): "
            "delete it to go on from the one before"
        )
    dcp.load(tensors, storage_reader=reader)


def _barrier() -> None:
    if world()[1] > 1:
        dist.barrier()
