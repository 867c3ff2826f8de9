"""The tensors of a checkpoint, in PyTorch's distributed format (DCP): each worker writes its own shards, any number of
workers reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter

# Private, because torch publishes a reader and a writer of local folders only.
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

from llada.errors import UserError
from llada.files import is_store_error, local_path
from llada.model.transformer import Transformer
from llada.training.checkpoint.checksums import Watched
from llada.training.checkpoint.folder import checkpoint_url
from llada.training.checkpoint.metadata import LocalReader, RemoteReader
from llada.training.checkpoint.state import DamagedError
from llada.training.ema import AVERAGE_SLOTS, WeightAverage

# Files that a worker writes side by side into a remote store, each in parts of which several are on their way at once.
_UPLOADS = 4


def named_tensors(model: Transformer, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Everything that must survive, under stable names: `model.<parameter>`, `optim.<parameter>.<slot>`. Frozen parameters
    need not: they are those that the run started from."""
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for optimizer in optimizers:
        for parameter, slots in optimizer.state.items():
            for slot, value in slots.items():
                tensors[f"optim.{names[id(parameter)]}.{slot}"] = value
    return tensors


def write_tensors(
    folder: str, step: int, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None
) -> dict[str, list[int]]:
    """Write this worker's shards of the tensors; {name: [bytes, CRC-32]} of the files that it wrote. A collective of the
    group (None: of all workers, in their own group). Raises what went wrong here or on another worker."""
    local = local_path(folder)
    # The tensors are on the CPU: where DCP copies ahead of its writing, it waits before each for all that the GPU has to do.
    # Syncing is for disks: a remote stream has no number, and torch would sync all disks of the machine instead.
    writer = (
        FileSystemWriter(checkpoint_url(local, step), per_thread_copy_ahead=0)
        if local is not None
        else FsspecWriter(
            checkpoint_url(folder, step), sync_files=False, thread_count=_UPLOADS, per_thread_copy_ahead=0
        )
    )
    watched = Watched(writer)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:  # no Exception for Python, so most handlers would miss it
        raise next(iter(error.failures.values()))[0] from error
    if watched.faults:
        raise watched.faults[0]
    return watched.files


def read_tensors(folder: str, step: int, model: Transformer, optimizers: list[torch.optim.Optimizer]) -> None:
    """Restore parameters and optimizer state in place, resharding as needed. A collective.

    An average of the weights that the checkpoint has and the run does not keep is left where it is; one that the run keeps
    and the checkpoint does not have begins anew.

    Raises UserError when they do not fit, DamagedError when they cannot be read.
    """
    local = local_path(folder)
    url = checkpoint_url(folder if local is None else local, step)
    reader = RemoteReader(url) if local is None else LocalReader(url)
    try:
        metadata = reader.read_metadata().state_dict_metadata
    except Exception as error:
        raise damage_or_fault(f"{url}/.metadata", error) from error
    make_slots(model, optimizers, metadata)
    tensors = named_tensors(model, optimizers)
    wanted = {key for key in metadata if key in tensors or key.rpartition(".")[2] not in AVERAGE_SLOTS}
    missing = sorted(set(tensors) ^ wanted)
    if missing:
        raise UserError(
            f"checkpoint {url} does not fit this model and optimizer ({', '.join(missing[:5])}): "
            "delete it to go on from the one before"
        )
    try:
        dcp.load(tensors, storage_reader=reader)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise damage_or_fault(url, first) from first


def make_slots(
    model: Transformer, optimizers: list[torch.optim.Optimizer], metadata: Mapping[str, Any]
) -> None:
    """Give the optimizers the state that `metadata` tells of and no other, empty: as large as the parameter or one number, and
    where the parameter is, as the fused optimizers make it themselves. In their precision, whatever the checkpoint's is."""
    # By the parameter, and by whether it moves that or only averages it.
    owner = {
        (id(p), isinstance(optimizer, WeightAverage)): optimizer
        for optimizer in optimizers
        for g in optimizer.param_groups
        for p in g["params"]
    }
    for optimizer in optimizers:
        optimizer.state.clear()
    for name, parameter in model.named_parameters():
        prefix = f"optim.{name}."
        for key, stored in metadata.items():
            slot = key.removeprefix(prefix)
            its = owner.get((id(parameter), slot in AVERAGE_SLOTS))
            if key.startswith(prefix) and its is not None:
                shaped = getattr(stored, "size", None) == parameter.shape
                its.state[parameter][slot] = (
                    torch.zeros_like(parameter.detach(), dtype=getattr(its, "slot_dtype", None))
                    if shaped
                    else torch.zeros((), dtype=torch.float32, device=parameter.device)
                )


def damage_or_fault(path: str, error: BaseException) -> Exception:
    """What to raise for a checkpoint that cannot be read: a store that is away has not damaged it."""
    reason = (
        f"{path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    )
    away = is_store_error(error) and not isinstance(error, FileNotFoundError)
    return RuntimeError(reason) if away or isinstance(error, MemoryError) else DamagedError(reason)
