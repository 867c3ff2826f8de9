"""Training checkpoints: sharded (DCP), resumable at any number of workers, on any fsspec URL.

`<folder>/step-00001000/` holds the shards of parameters and optimizer state; `state.json` (the run's identity, its cursor
and the files' checksums) is written last, so a folder without it is an interrupted write and is passed over, as is one
that has been damaged since. The data position is the step: noise and order are functions of it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Mapping
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
from llada.files import filesystem, is_store_error, join, local_path, write_bytes
from llada.model.transformer import Transformer, copy_full_
from llada.settings import from_dict
from llada.training.events import CheckpointSkipped
from llada.training.parallel import world

STATE_FILE = "state.json"
_CHUNK_BYTES = 1 << 23

log = logging.getLogger(__name__)


class DamagedError(Exception):
    """A checkpoint cannot be read; the message names its file."""


@dataclass(frozen=True)
class Cursor:
    """Where a run is: all that a checkpoint holds beside tensors. The data position is the step."""

    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Trained on so far, those of skipped steps included."""
    seconds: float = 0.0
    """Spent so far, attempts before this one included."""
    train_loss: float = float("nan")
    """Last logged, nats per token."""
    interval_loss: float = 0.0
    """Summed since then."""
    interval_steps: int = 0
    """Those of it whose loss was a finite number."""
    bad_steps: int = 0
    """The last ones, in a row, whose loss or gradient was not."""
    skipped_steps: int = 0
    """All such steps since the start, those that were done again included."""
    rollbacks: int = 0
    """How often the run went back to a checkpoint because of them."""
    lr_scale: float = 1.0
    """What the scheduled learning rates are multiplied with since then."""


def restore(
    folder: str,
    identity: Mapping[str, Any],
    model: Transformer,
    optimizers: list[torch.optim.Optimizer],
    *,
    initial_state: Mapping[str, Tensor] | None,
    seed: int,
    before: int | None = None,
) -> tuple[Cursor, list[CheckpointSkipped]]:
    """Fill the network (and optimizers) from the newest checkpoint that is whole, or else the initial weights, or else
    the seed; the cursor, and which newer checkpoints are not whole. A collective.

    Args:
        identity: JSON values of what must not change when a run goes on, by the name of what it is.
        initial_state: our parameter names -> full tensors, the same on every worker.
        before: the checkpoints of this step and later ones are of no use.

    Raises:
        UserError: the checkpoints are another run's, or do not fit the network and its optimizers; or all are damaged.
    """
    skipped = _interrupted(folder)
    complete = [step for step in complete_checkpoints(folder) if before is None or step < before]
    for step in reversed(complete):
        try:
            state = read_state(folder, step)
            stored = state.pop("identity")
            different = sorted(key for key in identity if stored.get(key) != identity[key])
            if different:
                raise UserError(
                    f"the checkpoints in {folder} are of another run ({', '.join(different)} differ): "
                    "choose another output folder"
                )
            _verify(folder, step, state.pop("files", {}))
            load_checkpoint(folder, step, model, optimizers)
        except DamagedError as error:
            skipped.append(CheckpointSkipped(step, str(error)))
        else:
            skipped = [skip for skip in skipped if skip.step > step]
            _warn(skipped, f"going on from step {step}")
            return Cursor(**state), skipped
    if complete:
        raise UserError(
            f"no checkpoint in {folder} is whole ({skipped[-1].reason}): delete that folder to train from the start"
        )
    _warn(skipped, "training from the start")
    if initial_state is None:
        model.init_weights(seed)
    else:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                copy_full_(parameter, initial_state[name])
    return Cursor(), skipped


def _warn(skipped: list[CheckpointSkipped], consequence: str) -> None:
    for skip in skipped if world()[0] == 0 else []:
        log.warning("%s: %s", skip.reason, consequence)


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
    written = _count_what_is_written(writer)
    try:
        dcp.save(_tensors(model, optimizers), storage_writer=writer)
    except CheckpointException as error:  # no Exception for Python, so most handlers would miss it
        first = next(iter(error.failures.values()))[0]
        raise RuntimeError(f"cannot write the checkpoint {url}: {first}") from first
    files = {name: entry for entries in _from_all(written) for name, entry in entries.items()}
    if world()[0] == 0:
        state = {"identity": identity, **asdict(cursor), "files": files}
        state["checksum"] = _checksum(state)
        write_bytes(f"{url}/{STATE_FILE}", json.dumps(state, indent=2).encode())
        for old in complete_checkpoints(folder)[:-keep]:
            fs.rm(f"{root.rstrip('/')}/step-{old:08d}", recursive=True)
    _barrier()
    return url


def drop_checkpoints(folder: str, after: int) -> None:
    """Delete the checkpoints of the steps after this one. A collective."""
    fs, root = filesystem(folder)
    _barrier()
    for step in _begun(folder) if world()[0] == 0 else []:
        path = join(root, f"step-{step:08d}")
        if step > after:
            with contextlib.suppress(FileNotFoundError):  # of an interrupted one
                fs.rm(join(path, STATE_FILE))  # first: what is half deleted is no checkpoint
            fs.rm(path, recursive=True)
    _barrier()


def complete_checkpoints(folder: str) -> list[int]:
    """Steps of the finished checkpoints, ascending."""
    fs, root = filesystem(folder)
    return [step for step in _begun(folder) if fs.exists(join(root, f"step-{step:08d}", STATE_FILE))]


def _begun(folder: str) -> list[int]:
    """Steps of all checkpoints, ascending."""
    fs, root = filesystem(folder)
    if not fs.exists(root):
        return []
    # Not a glob: the folder's own name may hold brackets or stars.
    names = [str(path).rstrip("/").split("/")[-1] for path in fs.ls(root, detail=False)]
    return sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d+", name))


def _interrupted(folder: str) -> list[CheckpointSkipped]:
    complete = set(complete_checkpoints(folder))
    return [
        CheckpointSkipped(
            step, f"{join(folder, f'step-{step:08d}')} has no {STATE_FILE} (an interrupted write)"
        )
        for step in _begun(folder)
        if step not in complete
    ]


def read_state(folder: str, step: int) -> dict[str, Any]:
    """What a checkpoint's state.json holds: "identity", the fields of `Cursor`, and "files" where checksums were kept:
    {name: [bytes, CRC-32]}. Raises DamagedError."""
    fs, root = filesystem(folder)
    url = join(folder, f"step-{step:08d}", STATE_FILE)
    try:
        state = json.loads(fs.cat_file(join(root, f"step-{step:08d}", STATE_FILE)))
        checksum = state.pop("checksum", None)
        if checksum not in (None, _checksum(state)):
            raise DamagedError(f"{url} has another checksum than when it was written")
        objective = state["identity"]["objective"]
        if "objective" in objective:  # older checkpoints call its kind so, and have no checksum
            objective["kind"] = objective.pop("objective")
        cursor = {name: value for name, value in state.items() if name not in ("identity", "files")}
        if from_dict(Cursor, cursor).step != step or not isinstance(state.get("files", {}), dict):
            raise ValueError(f"it is not that of step {step}")
    except (ValueError, TypeError, AttributeError, LookupError, IsADirectoryError) as error:
        raise DamagedError(f"{url} is damaged ({type(error).__name__}: {error})") from error
    return state


def load_checkpoint(
    folder: str, step: int, model: Transformer, optimizers: list[torch.optim.Optimizer]
) -> None:
    """Restore parameters and optimizer state in place, resharding as needed. A collective.

    Raises UserError when they do not fit, DamagedError when they cannot be read.
    """
    _, root = filesystem(folder)
    path = f"{root.rstrip('/')}/step-{step:08d}"
    reader = (
        FileSystemReader(path)
        if local_path(folder)
        else FsspecReader(f"{folder.rstrip('/')}/step-{step:08d}")
    )
    try:
        metadata = reader.read_metadata().state_dict_metadata
    except Exception as error:
        raise _damage_or_fault(f"{path}/.metadata", error) from error
    make_slots(model, optimizers, metadata)
    tensors = _tensors(model, optimizers)
    missing = sorted(set(tensors) ^ set(metadata))
    if missing:
        raise UserError(
            f"checkpoint {path} does not fit this model and optimizer ({', '.join(missing[:5])}): "
            "delete it to go on from the one before"
        )
    try:
        dcp.load(tensors, storage_reader=reader)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise _damage_or_fault(path, first) from first


def make_slots(
    model: Transformer, optimizers: list[torch.optim.Optimizer], metadata: Mapping[str, Any]
) -> None:
    """Give the optimizers the state that `metadata` tells of, empty: as large as the parameter or one number, and where the
    parameter is, as the fused optimizers make it themselves."""
    owner = {
        id(p): optimizer for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]
    }
    for name, parameter in model.named_parameters():
        prefix = f"optim.{name}."
        for key, stored in metadata.items():
            if key.startswith(prefix):
                shaped = getattr(stored, "size", None) == parameter.shape
                owner[id(parameter)].state[parameter][key.removeprefix(prefix)] = (
                    torch.zeros_like(parameter.detach())
                    if shaped
                    else torch.zeros((), dtype=torch.float32, device=parameter.device)
                )


def _damage_or_fault(path: str, error: BaseException) -> Exception:
    """What to raise for a checkpoint that cannot be read: a store that is away has not damaged it."""
    reason = (
        f"{path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    )
    away = is_store_error(error) and not isinstance(error, FileNotFoundError)
    return RuntimeError(reason) if away or isinstance(error, MemoryError) else DamagedError(reason)


# --- Checksums --------------------------------------------------------------------------------------------------------


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


def _count_what_is_written(writer: FileSystemWriter) -> dict[str, list[int]]:
    """{name: [bytes, CRC-32]} of the files that this worker's `writer` is going to write; it fills while they are."""
    written: dict[str, list[int]] = {}
    create = writer.fs.create_stream

    @contextlib.contextmanager
    def create_stream(path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with create(path, mode) as stream:
            counted = _Counted(stream)
            yield counted
        if mode == "wb":  # .metadata is written under a temporary name
            written[os.path.basename(path).removesuffix(".tmp")] = [counted.size, counted.crc]

    writer.fs.create_stream = create_stream  # type: ignore[method-assign]
    return written


def _verify(folder: str, step: int, files: Mapping[str, list[int]]) -> None:
    """Raises DamagedError, on every worker, for a file that is not as it was written. The workers share out the files."""
    fs, root = filesystem(folder)
    rank, num_workers = world()
    fault = None
    for name in sorted(files)[rank::num_workers]:
        size, crc = files[name]
        path, url = (join(place, f"step-{step:08d}", name) for place in (root, folder))
        if not fs.exists(path):
            fault = fault or f"{url} is missing"
        elif (found := fs.size(path)) != size:
            fault = fault or f"{url} has {found:,} bytes instead of {size:,}"
        elif _crc_of(fs, path) != crc:
            fault = fault or f"{url} has another checksum than when it was written"
    if fault := next(filter(None, _from_all(fault)), None):
        raise DamagedError(fault)


def _crc_of(fs: Any, path: str) -> int:
    crc = 0
    with fs.open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


def _checksum(state: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def _from_all(value: Any) -> list[Any]:
    """Each worker's `value`, in their order. A collective."""
    num_workers = world()[1]
    if num_workers == 1:
        return [value]
    values: list[Any] = [None] * num_workers
    dist.all_gather_object(values, value)
    return values


def _barrier() -> None:
    if world()[1] > 1:
        dist.barrier()
