"""Who writes into a folder of checkpoints: one run at a time, wherever it runs.

`<folder>/lease.json` names the holder, who renews it every RENEW_S seconds. Another process is refused in one line while that
goes on. A holder that has ended without a word is found out at once on the same machine, by its process number; elsewhere
by watching: who has not renewed for EXPIRY_S seconds is gone (no two machines' clocks are compared). Attempts of one run
(`run_id`) take over from each other at once: of those, the newest counts, and an older one that is still there may complete
no checkpoint any more.

Works on any store, by writing and reading back: of two that begin at the same moment, the last one to write holds it, and
the other finds that out at its next renewal or checkpoint.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llada.errors import UserError
from llada.files import filesystem, join, local_path, read_bytes, write_bytes
from llada.settings import from_dict

LEASE_FILE = "lease.json"
RENEW_S = 10.0
EXPIRY_S = 60.0
_LOOK_S = 2.0
# Workers whose command was killed follow it within seconds.
_ENDING_S = 5.0
# Until what two have written to a store at the same moment can be read there.
_SETTLE_S = 1.0

log = logging.getLogger(__name__)


class LeaseLostError(UserError):
    """Another process writes into the folder now."""


@dataclass(frozen=True)
class Holder:
    """What lease.json says."""

    run_id: str
    attempt: str
    """Of it; a random number."""
    host: str
    machine: str
    """Tells where `process` is a number that means something."""
    process: int
    process_started: str
    since: str
    """UTC, ISO 8601, as `renewed`."""
    renewed: str
    number: int = 0
    """Of the attempts of one run, in their order: it stands on no machine's clock."""


class Lease:
    """The right to write checkpoints into a folder, for a `with` block too. `run_id`: what the attempts of one run share; None: there is but one."""

    def __init__(self, folder: str, run_id: str | None = None) -> None:
        now, process = _now(), os.getpid()
        self.folder, self.url = folder, join(folder, LEASE_FILE)
        attempt = uuid.uuid4().hex
        self.holder = Holder(
            run_id or attempt,
            attempt,
            socket.gethostname(),
            _machine(),
            process,
            _start_of(process) or "",
            now,
            now,
        )
        self._gone: Holder | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def require_free(self) -> None:
        """Raises UserError while another run holds it. Takes nothing, and writes nothing."""
        self._find_free()

    def acquire(self) -> None:
        """Take it and renew it from now on. Raises UserError while another run holds it."""
        found = self._find_free()
        if found is not None and found.run_id == self.holder.run_id:
            self.holder = replace(self.holder, number=found.number + 1)
        self._write()
        if local_path(self.url) is None:
            time.sleep(_SETTLE_S)
        self.check()
        self._thread.start()

    def check(self) -> None:
        """Raises LeaseLostError when another has taken it."""
        found = self._read()
        if found is None or found.attempt == self.holder.attempt:
            return
        if found.run_id == self.holder.run_id and found.number < self.holder.number:
            return  # an older attempt that does not know of this one yet
        raise LeaseLostError(
            f"{_described(found)} has begun to train into {self.folder}: this one has ended; choose another output folder"
        )

    def release(self) -> None:
        """Give it back, if it is still there to be given."""
        self._over.set()
        if self._thread.ident:
            self._thread.join()
        try:
            found = self._read()
            if found is not None and found.attempt == self.holder.attempt:
                fs, path = filesystem(self.url)
                fs.rm(path)
        except Exception as error:  # it expires
            log.warning("%s could not be deleted: %s", self.url, error)

    def _renew(self) -> None:
        told = False
        while not self._over.wait(RENEW_S):
            try:
                self.check()
                self._write()
                told = False
            except LeaseLostError:  # the next checkpoint says so
                return
            except Exception as error:  # the store is away, for checkpoints too
                if not told:
                    log.warning("%s could not be renewed: %s", self.url, error)
                told = True

    def _find_free(self) -> Holder | None:
        """Who held it last, and does no more, if it was not given back; or an attempt of this run."""
        found = self._read()
        if found is None or found.run_id == self.holder.run_id or found == self._gone:
            return found
        if self._is_alive(found):
            raise UserError(f"{_described(found)} trains into {self.folder}: choose another output folder")
        self._gone = found
        return found

    def _is_alive(self, found: Holder) -> bool:
        if found.machine == self.holder.machine:
            begun = time.monotonic()
            while is_there := _start_of(found.process) == found.process_started:
                if time.monotonic() - begun > _ENDING_S:
                    break
                time.sleep(_ENDING_S / 50)
            return is_there
        log.info("%s holds %s: waiting whether it renews it", _described(found), self.url)
        begun = time.monotonic()
        while time.monotonic() - begun < EXPIRY_S:
            time.sleep(_LOOK_S)
            if (now := self._read()) != found:
                return now is not None  # given back otherwise
        return False

    def _read(self) -> Holder | None:
        try:
            data = read_bytes(self.url)
        except FileNotFoundError:
            return None
        try:
            return from_dict(Holder, json.loads(data))
        except (ValueError, TypeError, AttributeError) as error:
            log.warning("%s is damaged (%s) and holds nobody off", self.url, error)
            return None

    def _write(self) -> None:
        self.holder = replace(self.holder, renewed=_now())
        write_bytes(self.url, json.dumps(asdict(self.holder), indent=1).encode())


def _described(holder: Holder) -> str:
    return f"process {holder.process} on {holder.host} (since {holder.since}, last seen {holder.renewed})"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _machine() -> str:
    """Where a process has its number: a boot of a host, and in it a container."""
    words = [socket.gethostname()]
    try:
        words += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            os.readlink("/proc/self/ns/pid"),
        ]
    except OSError:  # not Linux
        words.append(str(uuid.getnode()))
    return " ".join(words)


def _start_of(process: int) -> str | None:
    """When a process of this machine was started, in the kernel's words; "" where it does not say. None: there is none."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # somebody else's
        pass
    try:
        # The words behind the program's name, which may hold anything: the third is the state, the 22nd the time.
        stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if stat[0] == "Z" else stat[19]  # a zombie has ended
