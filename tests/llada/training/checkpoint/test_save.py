"""Writing checkpoints beside the steps: what is kept, that a write sees its own step, and what becomes of one that fails."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint import FileSystemReader

from llada.model.transformer import Transformer
from llada.training.checkpoint import save
from llada.training.checkpoint.folder import checkpoint_url, complete_checkpoints
from llada.training.checkpoint.lease import LEASE_FILE
from llada.training.checkpoint.save import Checkpoints
from llada.training.checkpoint.state import Cursor, read_state
from llada.training.checkpoint.tensors import named_tensors, write_tensors
from llada.training.events import CheckpointDue, CheckpointFailed, Event, StepDone
from llada.training.optim import build_optimizers

IDENTITY: dict[str, Any] = {"objective": {"kind": "masked_diffusion"}}


@pytest.fixture
def network(make_config: Callable) -> tuple[Transformer, list[torch.optim.Optimizer]]:
    """A network that has made one step."""
    model_config, run = make_config()
    model = Transformer(model_config)
    model.init_weights(0)
    optimizers = build_optimizers(model, run.optim)
    move(model, optimizers)
    return model, optimizers


def move(model: Transformer, optimizers: list[torch.optim.Optimizer]) -> None:
    model(torch.arange(10)[None]).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_the_newest_are_kept_and_one_of_each_so_many_steps(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    configs = make_config(checkpoint_every=1, keep_checkpoints=1, keep_every=2)
    run_here(configs, pretrain_folder, tmp_path, stop_at=5)
    assert complete_checkpoints(str(tmp_path)) == [2, 4, 5]
    assert not (tmp_path / LEASE_FILE).exists()


class Gate:
    """A writing of tensors that waits to be let through, and fails as often as it is told to."""

    def __init__(self, *failures: Exception) -> None:
        self.failures, self.open, self.begun = list(failures), threading.Event(), threading.Event()

    def write_tensors(self, *args: Any) -> dict[str, list[int]]:
        self.begun.set()
        assert self.open.wait(60)
        if self.failures:
            raise self.failures.pop(0)
        return write_tensors(*args)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Makes the writing thread slow; it is real all the same."""
    gate = Gate()
    monkeypatch.setattr(save, "write_tensors", gate.write_tensors)
    monkeypatch.setattr(save, "_PAUSES_S", (0.01, 0.01))
    return gate


def test_what_is_written_meanwhile_is_byte_for_byte_what_was_there(
    network: Any, tmp_path: Path, gate: Gate
) -> None:
    """The network moves on while the checkpoint waits to be written."""
    model, optimizers = network
    at_once = str(tmp_path / "at once")
    Path(checkpoint_url(at_once, 7)).mkdir(parents=True)
    files = write_tensors(at_once, 7, named_tensors(model, optimizers))
    behind = str(tmp_path / "behind")
    with Checkpoints(behind) as checkpoints:
        checkpoints.save(Cursor(step=7), IDENTITY, model, optimizers)
        assert gate.begun.wait(60)
        for _ in range(3):
            move(model, optimizers)
        assert complete_checkpoints(behind) == []
        gate.open.set()
    state = read_state(behind, 7)
    shards = {name: entry for name, entry in files.items() if name.endswith(".distcp")}
    assert shards
    for name, entry in shards.items():
        places = (Path(checkpoint_url(home, 7), name).read_bytes() for home in (at_once, behind))
        assert len(set(places)) == 1
        assert state["files"][name] == entry
    # .metadata holds a random number for each writing beside these.
    ours, theirs = (FileSystemReader(checkpoint_url(home, 7)).read_metadata() for home in (at_once, behind))
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


def test_copies_are_made_in_the_same_memory_each_time(network: Any, tmp_path: Path) -> None:
    model, optimizers = network
    with Checkpoints(str(tmp_path)) as checkpoints:
        places = []
        for step in (1, 2):
            checkpoints.save(Cursor(step=step), IDENTITY, model, optimizers)
            assert checkpoints._write is not None
            places.append({name: t.data_ptr() for name, t in checkpoints._write.tensors.items()})
            checkpoints.wait()
            move(model, optimizers)
        assert places[0] == places[1]
        assert places[0]["model.embed.weight"] != model.embed.weight.data_ptr()


def test_one_is_written_at_a_time_and_the_end_waits(network: Any, tmp_path: Path, gate: Gate) -> None:
    model, optimizers = network
    events: list[Event] = []
    saved = threading.Event()

    def run() -> None:
        with Checkpoints(str(tmp_path), report=events.append) as checkpoints:
            checkpoints.save(Cursor(step=1), IDENTITY, model, optimizers)
            checkpoints.save(Cursor(step=2), IDENTITY, model, optimizers)
            saved.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert gate.begun.wait(60)
    assert not saved.wait(0.3)  # the second waits for the first
    gate.open.set()
    thread.join(60)
    assert complete_checkpoints(str(tmp_path)) == [1, 2]
    assert events == [CheckpointDue(1), CheckpointDue(2)]


AWAY = ConnectionResetError(104, "the store is away")


def test_training_goes_on_while_the_store_is_away(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path, gate: Gate
) -> None:
    """The checkpoint of step 2 fails, and so does the first attempt at the last one."""
    gate.failures = [AWAY]
    gate.open.set()
    configs = make_config(checkpoint_every=2, keep_checkpoints=9)
    run = run_here(configs, pretrain_folder, tmp_path / "run", stop_at=4)
    (failed,) = [event for event in run.events if isinstance(event, CheckpointFailed)]
    assert failed.step == 2
    assert "step-00000002: ConnectionResetError: [Errno 104] the store is away" in failed.reason
    assert [event.step for event in run.events if isinstance(event, StepDone)] == [1, 2, 3, 4]
    assert complete_checkpoints(str(tmp_path / "run")) == [4]
    gate.failures = [AWAY, AWAY]
    run_here(make_config(checkpoint_every=9), pretrain_folder, tmp_path / "last", stop_at=4)
    assert complete_checkpoints(str(tmp_path / "last")) == [4]


@pytest.mark.parametrize(
    ("failures", "words"),
    [
        ([AWAY] * 3, "the store is away"),  # also for the attempts at the end
        ([ValueError("a fault of ours")], "a fault of ours"),
        ([PermissionError(13, "denied")], "denied"),
        ([OSError(errno.ENOSPC, "No space left on device")], "No space"),
    ],
    ids=["away for good", "fault", "denied", "full"],
)
def test_a_last_checkpoint_that_cannot_be_written_is_raised(
    network: Any, tmp_path: Path, gate: Gate, failures: list[Exception], words: str
) -> None:
    gate.failures = list(failures)
    gate.open.set()
    with (
        pytest.raises(
            RuntimeError, match=f"cannot write the checkpoint .*step-00000001: .*{words}"
        ) as raised,
        Checkpoints(str(tmp_path)) as checkpoints,
    ):
        checkpoints.save(Cursor(step=1), IDENTITY, *network)
    assert raised.value.__cause__ is failures[-1]
    assert complete_checkpoints(str(tmp_path)) == []


def test_a_failure_that_will_not_pass_is_raised_at_the_next_checkpoint(
    network: Any, tmp_path: Path, gate: Gate
) -> None:
    gate.failures = [ValueError("a fault of ours")]
    gate.open.set()
    reached = []
    with pytest.raises(RuntimeError, match="a fault of ours"), Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(Cursor(step=1), IDENTITY, *network)
        reached.append(1)
        checkpoints.save(Cursor(step=2), IDENTITY, *network)
        reached.append(2)
    assert reached == [1]
    assert not (tmp_path / LEASE_FILE).exists()


def test_a_record_that_cannot_be_written_leaves_no_checkpoint(network: Any, tmp_path: Path) -> None:
    """The record of events must not be behind a checkpoint; it is the next one's turn."""

    def report(event: Event) -> None:
        if event == CheckpointDue(1):
            raise ConnectionResetError(104, "no record")
        said.append(event)

    said: list[Event] = []
    with Checkpoints(str(tmp_path), report=report) as checkpoints:
        for step in (1, 2):
            checkpoints.save(Cursor(step=step), IDENTITY, *network)
    assert complete_checkpoints(str(tmp_path)) == [2]
    assert [event.step for event in said if isinstance(event, CheckpointFailed)] == [1]


def test_a_place_that_lets_nobody_delete_keeps_all_and_ends_no_run(
    network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a bucket whose policy is so."""

    def refuse(self: LocalFileSystem, path: str, **options: bool) -> None:
        if Path(path).exists():
            raise PermissionError(errno.EACCES, "no right to delete")

    monkeypatch.setattr(LocalFileSystem, "rm", refuse)
    said: list[Event] = []
    with Checkpoints(str(tmp_path), keep=1, report=said.append) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(Cursor(step=step), IDENTITY, *network)
    assert complete_checkpoints(str(tmp_path)) == [1, 2, 3]
    told = [event for event in said if isinstance(event, CheckpointFailed)]
    assert [event.step for event in told] == [2, 3]
    assert "cannot delete old checkpoints" in told[0].reason


def test_what_ends_a_run_is_not_hidden_by_its_checkpoint(network: Any, tmp_path: Path, gate: Gate) -> None:
    gate.open.set()
    with pytest.raises(ZeroDivisionError), Checkpoints(str(tmp_path / "whole")) as checkpoints:
        checkpoints.save(Cursor(step=1), IDENTITY, *network)
        raise ZeroDivisionError
    assert complete_checkpoints(str(tmp_path / "whole")) == [1]
    gate.failures = [ValueError("a fault of ours")]
    with pytest.raises(ZeroDivisionError), Checkpoints(str(tmp_path / "failed")) as checkpoints:
        checkpoints.save(Cursor(step=1), IDENTITY, *network)
        raise ZeroDivisionError
