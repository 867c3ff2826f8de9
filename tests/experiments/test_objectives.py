"""The experiment on little data, as a user runs it, and the estimates that its table is made of."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from llada.data.tokens.shards import TokenDataset

HERE = Path(__file__).resolve().parent
STORIES = b"<|endoftext|>".join(
    b"\nThe %s went to the %s.\n" % words for words in [(b"cat", b"sea"), (b"dog", b"\xc3\xa9t\xc3\xa9")] * 40
)


@pytest.fixture(scope="module")
def done(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its output, with the text beside it."""
    folder = tmp_path_factory.mktemp("objectives")
    (folder / "tinystories.txt").write_bytes(STORIES)
    script.main(["--text", str(folder), "--output", str(folder / "out"), "--quick"])
    return folder / "out"


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "objectives.json").read_text())


def test_every_arm_has_its_numbers(script: ModuleType, done: Path):
    report = read(done)
    assert [row["arm"] for row in report["rows"]] == list(script.ARMS)
    table = (done / "objectives.md").read_text()
    for row in report["rows"]:
        assert np.isfinite(row["bounds"]).all()
        assert row["rate"] == report["settings"]["size"]["rates"][int(np.argmin(row["bounds_by_rate"]))]
        assert f"| {row['arm']} |" in table
        is_exact = row["arm"] == "autoregressive, exact"
        for part in row["noise"].values():
            assert part is None if is_exact else part["loss_std"] > 0
    assert report["rows"][0]["difference"] == [0.0, 0.0]
    assert report["machine"]["commit"]
    assert (done / "objectives.png").stat().st_size > 10_000
    assert not list((done / "checkpoints").iterdir())


def test_what_is_done_is_kept_and_what_is_missing_comes_out_the_same(
    script: ModuleType, done: Path, monkeypatch: pytest.MonkeyPatch
):
    before = read(done)
    (missing,) = (done / "runs").glob("mdlm-cosine-1.json")
    missing.unlink()
    others = {
        file: file.stat().st_mtime_ns
        for folder in ("rates", "runs", "noise")
        for file in (done / folder).iterdir()
    }
    script.main(["--text", str(done.parent), "--output", str(done), "--quick"])
    assert read(done)["rows"] == before["rows"]
    assert {file: file.stat().st_mtime_ns for file in others} == others
    monkeypatch.setitem(script.ARMS, "MDLM, cosine", script.LLADA)
    with pytest.raises(SystemExit, match="other settings"):
        script.main(["--text", str(done.parent), "--output", str(done), "--quick"])


def test_rows_are_the_text_behind_an_end_of_text_that_is_not_asked_for(done: Path):
    text = STORIES.replace(b"<|endoftext|>", b"\0")
    known = sorted(set(text) - {0})
    said = b""
    # Learned, chosen by and reported: each is a part of the text of its own, what is reported at its end.
    for split in ("train", "validation", "held_out"):
        dataset = TokenDataset(str(done / "data"), split)
        rows = dataset.rows(np.arange(len(dataset)))
        assert (rows.tokens[:, 0] == 0).all()
        assert (rows.maskable == (np.arange(16) > 0)).all()
        said += bytes(known[id - 2] if id else 0 for id in rows.tokens[:, 1:].ravel())
    assert len(text) - 15 < len(said) <= len(text)
    assert text.startswith(said)


def test_rates_are_chosen_by_rows_that_are_neither_learned_nor_reported(script: ModuleType, done: Path):
    experiment = script.Experiment(done.parent / "tinystories.txt", done, script.QUICK)
    rows = {split: script.rows_of(done / "data", split) for split in ("validation", "held_out")}
    assert experiment.held_out.equal(rows["held_out"])
    assert len(rows["validation"]) == len(rows["held_out"]) == script.QUICK.held_out_rows

    # The choice, made again on the rows beside the reported ones and on no others, is the kept one.
    name = "autoregressive, exact"
    (kept,) = (row for row in read(done)["rows"] if row["arm"] == name)
    result = experiment.train(
        script.ARMS[name],
        done / "again",
        rate=0.01,
        seed=script.RATE_SEED,
        num_steps=script.QUICK.num_steps // 4,
    )
    bounds = {split: experiment.bound(script.ARMS[name], result, of, 1) for split, of in rows.items()}
    assert bounds["validation"] == pytest.approx(kept["bounds_by_rate"][0], abs=1e-6)
    assert abs(bounds["held_out"] - bounds["validation"]) > 1e-4


def test_the_variance_of_a_gradient_is_unbiased_and_so_is_its_error(script: ModuleType):
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    products = [sum(float(g[i] @ g[j]) for i in range(3) for j in range(3) if i != j) / 6 for g in gradients]
    squares = [float(g.square().sum()) / 3 for g in gradients]
    ratio, _ = script.relative_variance(gradients @ gradients.transpose(1, 2))
    assert ratio == pytest.approx(sum(s - p for s, p in zip(squares, products, strict=True)) / sum(products))

    # Of normal noise (std 0.5 in 20 dimensions) around a vector of length 1: 20 · 0.25 / 1.
    estimates = []
    for _ in range(200):
        draws = 0.5 * torch.randn(3, 16, 20, generator=generator, dtype=torch.float64) + 20**-0.5
        estimates.append(script.relative_variance(draws @ draws.transpose(1, 2)))
    values, errors = torch.tensor(estimates, dtype=torch.float64).T
    assert values.mean().item() == pytest.approx(5.0, rel=0.15)
    assert errors.median().item() == pytest.approx(values.std().item(), rel=0.3)


def test_the_readme_shows_the_committed_result(script: ModuleType):
    assert script.table(read(HERE / "results")) in (HERE.parents[1] / "README.md").read_text()
