"""A trace of a run's steps, as a person opens it."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llada.training.profile import RECORDED, SETTLING, TABLE_FILE, TRACE_FILE


def test_some_steps_are_traced_and_learn_the_same(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    configs = make_config(num_steps=SETTLING + RECORDED + 2)
    plain = run_here(configs, pretrain_folder, tmp_path / "plain")
    traced = run_here(configs, pretrain_folder, tmp_path / "traced", profile_to=str(tmp_path / "profile"))
    assert traced.losses == plain.losses
    events = json.loads(gzip.decompress((tmp_path / "profile" / TRACE_FILE).read_bytes()))["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep#")}
    assert steps == {f"ProfilerStep#{SETTLING + number}" for number in range(RECORDED)}
    assert any(event.get("name") == "aten::mm" for event in events)
    assert "aten::mm" in (tmp_path / "profile" / TABLE_FILE).read_text()


def test_a_run_too_short_to_be_traced_ends_all_the_same(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    run = run_here(
        make_config(num_steps=2), pretrain_folder, tmp_path / "run", profile_to=str(tmp_path / "profile")
    )
    assert run.result.num_steps == 2
    assert not (tmp_path / "profile").exists()


def test_a_trace_that_cannot_be_written_ends_no_run(
    make_config: Callable,
    run_here: Callable,
    pretrain_folder: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "profile").write_text("a file in the way")
    steps = SETTLING + RECORDED + 1
    run = run_here(
        make_config(num_steps=steps), pretrain_folder, tmp_path / "run", profile_to=str(tmp_path / "profile")
    )
    assert run.result.num_steps == steps
    assert "the trace could not be written into" in caplog.text
