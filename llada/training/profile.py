"""Where the time of a step goes: a trace of a few steps by torch's own profiler."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from llada.files import join, write_bytes

SETTLING, RECORDED = 4, 3
"""Steps of an attempt that go by first, of which the last ones warm the profiler; and those that are traced."""
TRACE_FILE, TABLE_FILE = "trace.json.gz", "operations.txt"

log = logging.getLogger(__name__)


class StepProfiler:
    """Traces RECORDED steps of one worker into a folder (any fsspec URL): `trace.json.gz` for chrome://tracing or Perfetto,
    and `operations.txt`, the dearest operations. What cannot be written is told, and the run goes on."""

    def __init__(self, folder: str, device: torch.device) -> None:
        self.folder, self.device = folder, device
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(skip_first=SETTLING - 1, wait=0, warmup=1, active=RECORDED, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            profile_memory=True,
        )
        self._steps = 0
        self._profile.start()

    def step(self) -> None:
        """A step is done."""
        self._steps += 1
        if self._steps <= SETTLING + RECORDED:
            self._profile.step()
        if self._steps == SETTLING + RECORDED:
            self._profile.stop()

    def close(self) -> None:
        """The run is over; what was traced of it is written."""
        if self._steps < SETTLING + RECORDED:
            self._steps = SETTLING + RECORDED
            self._profile.stop()

    def _write(self, traced: profile) -> None:
        try:
            self._write_trace(traced)
        except Exception as error:  # the run is worth more than its trace
            log.warning("the trace could not be written into %s: %s", self.folder, error)

    def _write_trace(self, traced: profile) -> None:
        with tempfile.TemporaryDirectory() as local:
            path = Path(local) / TRACE_FILE
            traced.export_chrome_trace(str(path))
            write_bytes(join(self.folder, TRACE_FILE), path.read_bytes())
        order = f"self_{self.device.type}_time_total"
        table = traced.key_averages(group_by_input_shape=True).table(sort_by=order, row_limit=60)
        write_bytes(join(self.folder, TABLE_FILE), table.encode())
