"""Rows of the table: a group's own figure, a row for each task of a tag, and all that a figure depends on in its hash."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llada.evals.benchmarks.config import BenchmarkConfig
from llada.evals.benchmarks.run import run_benchmarks
from llada.evals.compare import compare
from llada.evals.evaluation import EvaluateConfig, Evaluation
from llada.evals.requests.scoring import ScoreConfig
from llada.files import write_bytes

SIZES = {"toy_long": 5, "toy_short": 2}


@pytest.fixture
def run(
    diffusion_model: str,
    evaluation_of: Callable[[str, EvaluateConfig], Evaluation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., dict[str, Any]]:
    """(names, settings of BenchmarkConfig) -> the summaries, of two tasks of questions with a tag, and groups of them."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for task, size in SIZES.items():
        write_questions(tmp_path, task, size)
        how = {
            "task": task,
            "tag": "toy_tag",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{task}.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "target_delimiter": "",
        }
        (tmp_path / f"{task}.yaml").write_text(json.dumps(how))
    for name, own in (
        ("toy_pooled", {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}),
        ("toy_mean", {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}]}),
        ("toy_group", {}),
    ):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"group": name, "task": list(SIZES), **own}))
    calls: list[Path] = []

    def run(*names: str, open_model: Any = None, **settings: Any) -> dict[str, Any]:
        calls.append(tmp_path / f"cache{len(calls)}")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", calls[-1])
        asked = {"task_folder": str(tmp_path), "score": ScoreConfig("left_to_right"), **settings}
        config = EvaluateConfig(("benchmarks",), benchmarks=BenchmarkConfig(names, **asked))
        evaluation = evaluation_of(diffusion_model, config)
        if open_model:
            evaluation = replace(evaluation, open_model=open_model(evaluation.open_model))
        figures = run_benchmarks(evaluation)
        write_bytes(f"{evaluation.output}/results.json", json.dumps(figures).encode())
        for name, summary in figures[
            "benchmarks"
        ].items():  # what MLflow and the manifest have, numbers alone
            assert figures[f"{name}/{summary['metric']}"] == summary["value"]
            assert figures.get(f"{name}/{summary['metric']}_stderr") == summary["stderr"]
        return dict(figures["benchmarks"])

    return run


def write_questions(folder: Path, task: str, size: int) -> None:
    """The answers are such that the shares of the tasks differ whatever the network says."""
    lines = [{"question": f"What is {n}?", "choices": [" it", " nothing"], "answer": 0} for n in range(size)]
    if task == "toy_short":
        lines = [{**line, "choices": [" it", " it"], "answer": n % 2} for n, line in enumerate(lines)]
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_group_has_its_own_figure_and_a_tag_a_row_for_each_task(run: Any, tmp_path: Path) -> None:
    found = run("toy_pooled", "toy_mean", "toy_group", "toy_tag")
    values = {task: found[f"toy_tag/{task}"]["value"] for task in SIZES}
    assert values["toy_short"] == 0.5
    assert values["toy_long"] in (0, 0.2, 0.4, 0.6, 0.8, 1)
    assert {name for name in found if "/" in name} == {
        f"{name}/{task}" for name in ("toy_tag", "toy_group") for task in SIZES
    }
    pooled, mean = found["toy_pooled"], found["toy_mean"]
    assert pooled["value"] == pytest.approx((5 * values["toy_long"] + 1) / 7)
    assert mean["value"] == pytest.approx((values["toy_long"] + 0.5) / 2)
    assert (pooled["items"], pooled["requests"], found["toy_tag/toy_short"]["requests"]) == (7, 14, 4)
    assert (pooled["is_mean_of_tasks"], mean["is_mean_of_tasks"]) == (False, True)
    assert "lm_eval's own figure of the group, the mean over the items of all its tasks" in pooled["remark"]
    assert "one of 2 tasks of toy_tag" in found["toy_tag/toy_short"]["remark"]
    table = (tmp_path / "out" / "benchmarks.md").read_text()
    assert table.count("| toy_short |") == 2
    # Compared with itself, each row finds its items, and comes to the same.
    for difference in compare(str(tmp_path / "out"), str(tmp_path / "out")).differences:
        assert difference.a == pytest.approx(found[difference.name]["value"])
        assert difference.items == found[difference.name]["items"]


def test_the_hash_knows_the_documents_their_number_and_the_precision(run: Any, tmp_path: Path) -> None:
    (first,) = run("toy_long").values()
    assert first["settings"]["dtype"] == "float32"
    assert "limit" not in first["settings"]
    (again,) = run("toy_long").values()
    assert again["settings_hash"] == first["settings_hash"]
    (fewer,) = run("toy_long", limit=3).values()
    assert fewer["settings"]["limit"] == 3

    def rounded(open_model: Any) -> Any:
        return lambda *, fast: (lambda model, tokenizer: (model.bfloat16(), tokenizer))(
            *open_model(fast=fast)
        )

    (coarse,) = run("toy_long", open_model=rounded).values()
    assert coarse["settings"] == {**first["settings"], "dtype": "bfloat16"}
    file = tmp_path / "toy_long.jsonl"
    file.write_text(file.read_text().replace("What is 4", "What is 9"))
    (other,) = run("toy_long").values()
    assert other["settings"] == {**first["settings"], "asked": other["settings"]["asked"]}
    hashes = {summary["settings_hash"] for summary in (first, fewer, coarse, other)}
    assert len(hashes) == 4
