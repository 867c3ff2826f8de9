"""Writing checkpoints beside the steps of a run, and deleting those that it needs no more.

The training thread takes a copy of its shards in the CPU's memory and trains on; a thread of its own writes them, with a
gloo group of its own where there are several workers. One checkpoint is written at a time: the next one, and the end of the
run, wait for it. state.json follows when all workers have written.

A write that fails because the store is away is told, and the next checkpoint is written when it is due: training does not
stop for it. The last one of a run is tried again; that, and every other failure, is raised on all workers at the next
checkpoint or at the end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# Private, because what torch 2.11 publishes around it (DefaultStager) can be used once only.
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from llada.errors import UserError
from llada.files import filesystem
from llada.model.transformer import Transformer
from llada.store_errors import may_pass, told
from llada.training.checkpoint.folder import (
    begun_checkpoints,
    checkpoint_url,
    delete_checkpoint,
    retain_checkpoints,
)
from llada.training.checkpoint.lease import Lease
from llada.training.checkpoint.state import Cursor, write_state
from llada.training.checkpoint.tensors import named_tensors, write_tensors
from llada.training.events import CheckpointDue, CheckpointFailed, EventSink
from llada.training.parallel import from_all, wait_for_all, world

# Before the last checkpoint of a run is tried again.
_PAUSES_S = (5.0, 30.0, 120.0)

T = TypeVar("T")

log = logging.getLogger(__name__)


class _Write(NamedTuple):
    """A checkpoint, ready to be written."""

    cursor: Cursor
    identity: Mapping[str, Any]
    tensors: dict[str, Tensor]


class _Fault(NamedTuple):
    """Why a checkpoint was not written, the same on every worker."""

    reason: str
    may_pass: bool


class _WriteError(Exception):
    def __init__(self, reason: str, may_pass: bool) -> None:
        super().__init__(reason)
        self.may_pass = may_pass


class Checkpoints:
    """The checkpoints that a run writes into a folder, for a `with` block, at whose end all are written. Its methods are
    collectives.

    Args:
        keep, keep_every: see `kept_checkpoints`.
        run_id: what the attempts of one run share (see `Lease`).
        report: is told, on worker 0, of those that could not be written or deleted.
    """

    def __init__(
        self,
        folder: str,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        run_id: str | None = None,
        report: EventSink | None = None,
    ) -> None:
        self.folder, self.keep, self.keep_every, self.report = folder, keep, keep_every, report
        self._is_first = world()[0] == 0
        self._lease = Lease(folder, run_id) if self._is_first else None
        self._group = dist.new_group(backend="gloo") if world()[1] > 1 else None
        # Its copies are made once and filled again each time: pinned memory is dear to get.
        self._stager = StateDictStager(pin_memory=torch.cuda.is_available())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._write: _Write | None = None
        self._outcome: Future[_Fault | None] | None = None
        self._cause: BaseException | None = None

    def __enter__(self) -> Checkpoints:
        refused = None
        if self._lease is not None:
            try:
                self._lease.acquire()
            except UserError as error:
                refused = error
        # As it is: a store that is away may be back when the workers start again, another run is there still.
        if refused := next(filter(None, from_all(refused)), None):
            raise refused
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
            elif self._outcome is not None and (fault := self._outcome.result()) is not None:
                log.warning("%s", fault.reason)  # beside what has ended the run
        finally:
            self._thread.shutdown()
            self._stager.close()
            if self._lease is not None:
                self._lease.release()
            if self._group is not None and kind is None:
                wait_for_all()  # or one would hang up on another
                dist.destroy_process_group(self._group)

    def save(
        self,
        cursor: Cursor,
        identity: Mapping[str, Any],
        model: Transformer,
        optimizers: list[torch.optim.Optimizer],
    ) -> None:
        """Begin the checkpoint of the run at `cursor`, once the one before is written.

        Raises RuntimeError where that has failed in a way that will not pass.
        """
        self.wait()
        on_gpu = torch.cuda.is_available()
        tensors = self._stager.stage(named_tensors(model, optimizers), non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize()
        self._write = _Write(cursor, identity, tensors)
        self._outcome = self._thread.submit(self._written, self._write)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written. Raises as `save`."""
        outcome, self._outcome = self._outcome, None
        fault = outcome.result() if outcome is not None else None
        if fault is None:
            return
        if not fault.may_pass:
            raise RuntimeError(fault.reason) from self._cause
        assert self._write is not None
        if self.report and self._is_first:
            self.report(CheckpointFailed(self._write.cursor.step, fault.reason))

    def drop(self, after: int) -> None:
        """Delete the checkpoints of the steps after this one."""
        self.wait()
        wait_for_all()
        for step in begun_checkpoints(self.folder) if self._is_first else []:
            if step > after:
                delete_checkpoint(self.folder, step)
        wait_for_all()

    def _finish(self) -> None:
        """Wait for the last one, and write it again where the store was away."""
        for pause in _PAUSES_S:
            outcome = self._outcome
            fault = outcome.result() if outcome is not None else None
            if fault is None or not fault.may_pass:
                break
            log.warning("%s; it is tried again in %g s", fault.reason, pause)
            time.sleep(pause)
            assert self._write is not None
            self._outcome = self._thread.submit(self._written, self._write)
        if self._outcome is not None and (fault := self._outcome.result()) is not None:
            raise RuntimeError(fault.reason) from self._cause

    def _written(self, write: _Write) -> _Fault | None:
        """Write a checkpoint; why it could not be. Runs in the thread."""
        step = write.cursor.step
        try:
            self._on_all(lambda: self._make_room(step) if self._is_first else None)
            files = self._on_all(lambda: write_tensors(self.folder, step, write.tensors, self._group))
            self._on_all(lambda: self._complete(write, files) if self._is_first else None)
        except _WriteError as error:
            return _Fault(
                f"cannot write the checkpoint {checkpoint_url(self.folder, step)}: {error}", error.may_pass
            )
        except Exception as error:  # of the group: another worker is gone
            self._cause = error
            return _Fault(f"cannot write the checkpoint {checkpoint_url(self.folder, step)}: {error}", False)
        return None

    def _make_room(self, step: int) -> None:
        delete_checkpoint(self.folder, step)
        fs, root = filesystem(self.folder)
        fs.makedirs(checkpoint_url(root, step), exist_ok=True)

    def _complete(self, write: _Write, files: list[dict[str, list[int]]]) -> None:
        if self._lease is not None:
            self._lease.check()
        if self.report:
            self.report(CheckpointDue(write.cursor.step))
        named = {name: entry for some in files for name, entry in some.items()}
        write_state(self.folder, write.cursor, write.identity, named)
        try:
            retain_checkpoints(self.folder, keep=self.keep, keep_every=self.keep_every)
        except Exception as error:  # this one is whole; without the right to delete, say, all are kept
            log.warning("cannot delete old checkpoints", exc_info=True)
            if self.report:
                reason = f"cannot delete old checkpoints in {self.folder}: {type(error).__name__}: {error}"
                self.report(CheckpointFailed(write.cursor.step, reason))

    def _on_all(self, call: Callable[[], T]) -> list[T]:
        """What each worker's call returns. Raises _WriteError on all of them where one fails."""
        answer, fault = None, None
        try:
            answer = call()
        except Exception as error:
            self._cause = error
            problem = told(error, self.folder)  # a full disk, say, is the user's to mend
            passes = may_pass(error) if problem is None else problem.may_pass
            fault = (f"{type(error).__name__}: {error}", passes)
        everyones = from_all((answer, fault), self._group)
        if faults := [fault for _, fault in everyones if fault is not None]:
            raise _WriteError(faults[0][0], all(passes for _, passes in faults))
        return [answer for answer, _ in everyones]
