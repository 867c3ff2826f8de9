"""What leads from a training's workers to its driver: told by the workers, who do not wait, and heard by one thread of the driver.

On one machine it is a file. Between machines it is a queue of Ray on the driver's: what is lost with any other must be replaceable.
Both ends of it may be gone: then their methods raise OSError, or Ray's errors.
"""

from __future__ import annotations

import binascii
import os
import pickle
import tempfile
import threading
from typing import Any, Protocol

# How long a worker that is done waits for the driver's machine to have what it has told.
FLUSH_TIMEOUT_S = 10.0
# Between two looks at the file.
LOOK_EVERY_S = 0.2


class Channel(Protocol):
    """Picklable."""

    def put(self, item: object) -> None:
        """Tell it. Does not wait."""

    def flush(self) -> None:
        """Wait a little until what this process has told can be heard even when it is gone."""

    def get(self) -> Any:
        """What comes next, which is waited for; None behind all that was told before `close`."""

    def close(self) -> None:
        """Of the driver: nothing more is to come."""

    def remove(self) -> None:
        """Of the driver, when nobody is in `get`."""


class QueueChannel:
    """Through an actor of Ray on this machine. It may take two items that come at the same time in another order."""

    def __init__(self) -> None:
        import ray
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.queue: Any = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        self._last: Any = None

    def put(self, item: object) -> None:
        self._last = self.queue.actor.put_nowait.remote(item)

    def flush(self) -> None:
        import ray

        if self._last is not None:
            ray.wait([self._last], timeout=FLUSH_TIMEOUT_S)

    def get(self) -> Any:
        return self.queue.get()

    def close(self) -> None:
        self.queue.put(None)

    def remove(self) -> None:
        self.queue.shutdown()


class FileChannel:
    """Through a file, an item a line: no process stands between, which would look up a hundred times a second."""

    def __init__(self, path: str | None = None) -> None:
        if path is None:
            number, path = tempfile.mkstemp(prefix="llada-events-")
            os.close(number)
        self.path = path
        self._closed = threading.Event()
        self._heard = 0  # bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return FileChannel, (self.path,)

    def put(self, item: object) -> None:
        # One write, which no other worker's interrupts. One that is cut off, on a full disk, ends with the next item's newline.
        line = b"\n" + binascii.b2a_base64(pickle.dumps(item))
        number = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(number, line)
        finally:
            os.close(number)

    def flush(self) -> None:
        """What is written can be heard."""

    def get(self) -> Any:
        with open(self.path, "rb") as file:
            file.seek(self._heard)
            while True:
                is_last = self._closed.is_set()  # asked first: what was told before that is there
                line = file.readline()
                if line.endswith(b"\n"):
                    self._heard = file.tell()
                    try:
                        if line.strip():
                            return pickle.loads(binascii.a2b_base64(line))
                    except (binascii.Error, pickle.UnpicklingError, EOFError):
                        continue  # cut off
                elif is_last:
                    return None
                else:
                    file.seek(self._heard)
                    self._closed.wait(LOOK_EVERY_S)

    def close(self) -> None:
        self._closed.set()

    def remove(self) -> None:
        os.unlink(self.path)
