"""What is loaded is no matter of the collector's any more. (In a replica: test_replica.py.)"""

from __future__ import annotations

import gc

from pipelines.serving.collector import freeze_loaded


def test_what_is_loaded_is_not_walked_over() -> None:
    loaded: list[list[int]] = [[] for _ in range(1000)]
    freeze_loaded()
    try:
        assert gc.get_freeze_count() > 1000
        assert not any(each is loaded for each in gc.get_objects())
    finally:
        gc.unfreeze()
    assert any(each is loaded for each in gc.get_objects())
