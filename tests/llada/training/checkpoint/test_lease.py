"""One run at a time writes into a folder: refusal, take-over, and what happens to one that does not know it has lost."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from llada.errors import UserError
from llada.files import write_bytes
from llada.store_errors import StoreError, may_pass
from llada.training.checkpoint import lease
from llada.training.checkpoint.folder import complete_checkpoints
from llada.training.checkpoint.lease import Lease, LeaseLostError
from llada.training.checkpoint.save import Checkpoints


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {
        "RENEW_S": 0.05,
        "EXPIRY_S": 0.6,
        "_LOOK_S": 0.02,
        "_SETTLE_S": 0.0,
        "_ENDING_S": 0.1,
    }.items():
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}"


@pytest.fixture
def held() -> Iterator[Callable[..., Lease]]:
    """Leases that are given back at the end."""
    leases: list[Lease] = []

    def hold(folder: str, run_id: str | None = None) -> Lease:
        leases.append(Lease(folder, run_id))
        leases[-1].acquire()
        return leases[-1]

    yield hold
    for each in leases:
        each.release()


def leave(held: Lease) -> None:
    """It dies: renews no more, and says nothing."""
    held._over.set()
    held._thread.join()


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read(folder: str) -> dict[str, Any]:
    fs, root = fsspec.url_to_fs(folder)
    return json.loads(fs.cat_file(f"{root}/lease.json"))


def rewrite(folder: str, **changes: Any) -> None:
    """Whole, as a lease is written: somebody may be reading it."""
    write_bytes(f"{folder}/lease.json", json.dumps({**read(folder), **changes}).encode())


def test_another_run_is_refused_in_one_line_that_says_who(folder: str, held: Callable[..., Lease]) -> None:
    first = held(folder)
    with pytest.raises(UserError) as raised:
        Lease(folder).acquire()
    holder = first.holder
    assert f"process {os.getpid()} on {holder.host} (since {holder.since}, last seen " in str(raised.value)
    assert str(raised.value).endswith(f"trains into {folder}: choose another output folder")
    assert "\n" not in str(raised.value)
    first.check()


def test_who_looks_whether_it_is_free_takes_nothing(folder: str, held: Callable[..., Lease]) -> None:
    Lease(folder).require_free()
    assert not fsspec.url_to_fs(folder)[0].exists(f"{folder}/lease.json")
    first = held(folder, "run")
    before = read(folder)["attempt"]
    with pytest.raises(UserError, match="trains into"):
        Lease(folder).require_free()
    Lease(folder, "run").require_free()
    assert read(folder)["attempt"] == before
    first.check()


def test_who_has_seen_that_a_holder_is_gone_does_not_wait_for_it_again(
    folder: str, held: Callable[..., Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    held(folder).release()
    Lease(folder)._write()  # by one that renews it no more
    rewrite(folder, machine="elsewhere")
    second = Lease(folder)
    second.require_free()
    monkeypatch.setattr(lease, "EXPIRY_S", 1000.0)
    with second:
        assert read(folder)["attempt"] == second.holder.attempt


def test_what_is_given_back_can_be_taken(folder: str, held: Callable[..., Lease]) -> None:
    held(folder).release()
    assert not fsspec.url_to_fs(folder)[0].exists(f"{folder}/lease.json")
    second = held(folder)
    assert read(folder)["attempt"] == second.holder.attempt


def test_on_this_machine_an_ended_process_is_found_out_at_once(
    folder: str, held: Callable[..., Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "EXPIRY_S", 1000.0)
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    leave(held(folder))
    rewrite(folder, process=int(ended.stdout))
    leave(held(folder))
    # Its number has been given to another process since.
    rewrite(folder, process=os.getpid(), process_started="1", run_id="before")
    held(folder)


@pytest.mark.parametrize("ends", ["dies", "gives it back", "lives"])
def test_a_holder_elsewhere_is_watched(
    folder: str, held: Callable[..., Lease], ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process number means nothing here, and its clock may be wrong: only whether it renews counts."""
    expiry_s = 0.6 if ends == "dies" else 60.0
    monkeypatch.setattr(lease, "EXPIRY_S", expiry_s)
    leave(held(folder))
    elsewhere = read(folder) | {"machine": "another", "host": "far", "renewed": "2001-01-01T00:00:00+00:00"}
    fs, root = fsspec.url_to_fs(folder)
    over = threading.Event()

    def live() -> None:
        for number in range(3 if ends == "gives it back" else 1000):
            if over.wait(0.05):
                return
            if ends == "lives":
                rewrite(folder, renewed=str(number))
        fs.rm(f"{root}/lease.json")

    rewrite(folder, **elsewhere)
    thread = threading.Thread(target=live)
    if ends != "dies":
        thread.start()
    begun = time.monotonic()
    try:
        if ends == "lives":
            with pytest.raises(UserError, match="on far"):
                Lease(folder).acquire()
            assert time.monotonic() - begun < expiry_s  # it need not wait for the end
        else:
            taken = held(folder)
            assert read(folder)["attempt"] == taken.holder.attempt
            assert (time.monotonic() - begun > expiry_s) == (ends == "dies")
    finally:
        over.set()
        if ends != "dies":
            thread.join()


def test_the_attempts_of_one_run_take_over_at_once(
    folder: str, held: Callable[..., Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "EXPIRY_S", 1000.0)
    first = held(folder, "a run")
    rewrite(folder, machine="another")
    monkeypatch.setattr(lease, "_now", lambda: "2001-01-01T00:00:00.000+00:00")  # its clock is behind
    second = held(folder, "a run")
    first._thread.join(60)  # it does not renew any more
    assert not first._thread.is_alive()
    with pytest.raises(LeaseLostError, match="has begun to train into .*: this one has ended"):
        first.check()
    # The first had looked before the second came, and writes behind it.
    rewrite(folder, **dataclasses.asdict(first.holder))
    second.check()
    until(lambda: read(folder)["attempt"] == second.holder.attempt)
    first.release()
    assert read(folder)["attempt"] == second.holder.attempt


def test_of_two_at_the_same_moment_the_last_to_write_holds_it(
    folder: str, held: Callable[..., Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 1000.0)  # a renewal under way would make the first the last
    first = held(folder)
    second = Lease(folder)
    second._write()  # it had looked before the first wrote
    with pytest.raises(LeaseLostError):
        first.check()
    second.check()


def test_a_damaged_lease_holds_nobody_off(
    folder: str, held: Callable[..., Lease], caplog: pytest.LogCaptureFixture
) -> None:
    leave(held(folder))
    fs, root = fsspec.url_to_fs(folder)
    for damage in (b"", b"{", b"[]", b'{"host": 1}'):
        fs.pipe_file(f"{root}/lease.json", damage)
        leave(held(folder))
    assert "lease.json is damaged" in caplog.text


def test_a_store_that_is_away_does_not_end_it(
    tmp_path: Path,
    held: Callable[..., Lease],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, tries = held(str(tmp_path)), 0

    def fail(*_: Any) -> None:
        nonlocal tries
        tries += 1
        raise ConnectionResetError("away")

    with monkeypatch.context() as away:
        away.setattr(lease, "write_bytes", fail)
        until(lambda: tries > 2)
        before = read(str(tmp_path))["renewed"]
    until(lambda: read(str(tmp_path))["renewed"] > before)
    assert [record.message.count("could not be renewed: away") for record in caplog.records].count(1) == 1
    assert first._thread.is_alive()


def test_a_store_that_is_away_when_a_run_begins_may_be_back_at_its_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = StoreError("s3://bucket: the store is overloaded; run the same command again")
    away.may_pass = True
    monkeypatch.setattr(lease, "read_bytes", lambda _: (_ for _ in ()).throw(away))
    with pytest.raises(StoreError) as raised, Checkpoints(str(tmp_path)):
        pass
    assert may_pass(pickle.loads(pickle.dumps(raised.value)))  # on all workers


def test_a_run_that_has_lost_its_folder_completes_no_checkpoint(
    make_config: Callable,
    run_here: Callable,
    pretrain_folder: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 1000.0)  # a renewal under way would take it back
    configs = make_config(checkpoint_every=2)

    def steal(event: Any) -> None:
        if getattr(event, "step", 0) == 3 and not stolen:
            while complete_checkpoints(str(tmp_path)) != [2]:
                time.sleep(0.01)
            stolen.append(Lease(str(tmp_path)))
            stolen[0]._write()

    stolen: list[Lease] = []
    with pytest.raises(RuntimeError, match="has begun to train into"):
        run_here(configs, pretrain_folder, tmp_path, report=steal)
    assert complete_checkpoints(str(tmp_path)) == [2]
    assert read(str(tmp_path))["attempt"] == stolen[0].holder.attempt
    with pytest.raises(UserError, match=f"process {os.getpid()} on .* trains into"):
        run_here(configs, pretrain_folder, tmp_path)
