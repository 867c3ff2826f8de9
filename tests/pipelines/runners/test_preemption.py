"""Who asks a worker to leave. (That it does: test_workers.py, test_elastic.py.)"""

from __future__ import annotations

import os
import signal
import threading

import pytest

from pipelines.runners import preemption
from pipelines.runners.preemption import LeaveOnSigterm

pytestmark = pytest.mark.integration


def test_the_first_sigterm_asks_and_the_second_does_what_it_did(monkeypatch):
    monkeypatch.setattr(preemption, "_asked", threading.Event())
    others: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: others.append(number))
    try:
        LeaveOnSigterm().after_init_train_context()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption._asked.is_set()
        assert others == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert others == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
