"""The ladder on little text, as a user runs it, and what it fits."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
STORIES = b"<|endoftext|>".join(
    b"\nThe %s went to the %s.\n" % words for words in [(b"cat", b"sea"), (b"dog", b"hill")] * 20
)


@pytest.fixture(scope="module")
def done(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaling")
    (folder / "tinystories.txt").write_bytes(STORIES)
    script.main(["--text", str(folder), "--output", str(folder / "out"), "--quick"])
    return folder / "out"


def test_every_rung_has_its_numbers(script: ModuleType, done: Path):
    report = json.loads((done / "scaling.json").read_text())
    # 4 · 32² of attention with 2 · 32 of its norms, 3 · 32 · 96 of the SwiGLU, and three norms of 32.
    assert report["parameters"] == [4 * 32**2 + 2 * 32 + 3 * 32 * 96 + 3 * 32] * 2
    assert report["tokens"] == [2 * 16 * 15, 6 * 16 * 15]
    assert report["flops"] == [6.0 * report["parameters"][0] * tokens for tokens in report["tokens"]]
    for losses in report["losses"].values():
        assert [len(of_rung) for of_rung in losses] == [2, 2]
        assert np.mean(losses[1]) < np.mean(losses[0])
    assert (done / "scaling.png").stat().st_size > 10_000
    assert "| exponent b |" in (done / "scaling.md").read_text()


def test_no_rate_is_chosen_by_the_rows_of_the_losses(script: ModuleType):
    assert {len(rung.rates) for size in (script.FULL, script.QUICK, script.SCALE) for rung in size.rungs} == {
        1
    }


def test_a_power_law_is_fitted_as_it_is(script: ModuleType):
    flops = np.array([1e9, 1e10, 1e12])
    a, b = script.fit(flops, 5 * flops**-0.07)
    assert b == pytest.approx(0.07)
    assert np.exp(a) == pytest.approx(5)


def test_quokkas_law_is_told_where_it_was_fitted(script: ModuleType):
    # The paper's optimum at 1e19 FLOPs, with the bound that its own table has there.
    assert float(script.expected(1e19, 126e6, 13.2e9)) == pytest.approx(3.78, abs=0.01)
    assert script.expected(0.9e19, 126e6, 13.2e9) == "below its range"
    assert script.expected(1.1e21, 1.34e9, 124e9) == "above its range"


def test_the_readme_shows_the_committed_result(script: ModuleType):
    report = json.loads((HERE / "results" / "scaling.json").read_text())
    assert script.table(report) in (HERE.parents[1] / "README.md").read_text()
