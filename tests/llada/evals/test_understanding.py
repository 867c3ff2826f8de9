"""The task "understanding" end to end, on real reviews, and what is wrong with labelled rows."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llada.errors import UserError
from llada.evals.evaluation import EvaluateConfig, Evaluation
from llada.evals.understanding import measure_understanding
from llada.understanding.config import UnderstandingConfig

SHARED = Path(os.environ.get("LLADA_SHARED") or Path(__file__).resolve().parents[4] / "shared")
EvaluationOf = Callable[[str, EvaluateConfig], Evaluation]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    """Whether a cat sits on the mat: the network sees it in the first word."""
    rows = [
        {"text": f"{who} sat on the mat {n}", "label": label}
        for n in range(40)
        for who, label in (("The cat", "yes"), ("It is", "no"))
    ]
    understanding = UnderstandingConfig(
        train=write_rows(tmp_path / "train.jsonl", rows[:60]),
        test=write_rows(tmp_path / "test.jsonl", [*rows[60:], {"text": "The cat", "label": "no"}]),
        num_epochs=5,
        batch_rows=8,
        lr=5e-3,
        seeds=2,
    )
    return EvaluateConfig(understanding=understanding)


@pytest.mark.parametrize("kind", ["diffusion_model", "causal_model"])
def test_what_is_learned_is_judged(
    kind: str, config: EvaluateConfig, evaluation_of: EvaluationOf, request: pytest.FixtureRequest
) -> None:
    evaluation = evaluation_of(request.getfixturevalue(kind), config)
    figures = measure_understanding(evaluation)
    # All but the row whose label is wrong.
    assert figures["understanding/accuracy"] == pytest.approx(20 / 21)
    assert 0 < figures["understanding/accuracy_stderr"] < 0.1
    assert figures["understanding/accuracy_seed_stderr"] == 0
    # Of classes that are equally common in training, that of the first row.
    assert figures["understanding/majority"] == pytest.approx(10 / 21)
    assert (figures["understanding/train_rows"], figures["understanding/test_rows"]) == (60, 21)
    lines = [
        json.loads(line) for line in Path(evaluation.output, "understanding.jsonl").read_text().splitlines()
    ]
    assert lines[-1] == {"text": "The cat", "label": "no", "answers": ["yes", "yes"]}


def test_longer_texts_are_counted(
    diffusion_model: str, config: EvaluateConfig, evaluation_of: EvaluationOf
) -> None:
    short = replace(config.understanding, max_length=4, num_epochs=0.1, seeds=1)
    figures = measure_understanding(evaluation_of(diffusion_model, replace(config, understanding=short)))
    assert figures["understanding/texts_cut"] == 80
    assert "understanding/accuracy_seed_stderr" not in figures


def test_what_has_no_labels_is_one_line(
    tmp_path: Path,
    diffusion_model: str,
    causal_model: str,
    config: EvaluateConfig,
    evaluation_of: EvaluationOf,
) -> None:
    rows = {
        "other": [{"text": "a", "label": "yes"}, {"text": "b", "label": "yess"}],
        "bare": [{"text": "a", "label": "yes"}, {"text": "b", "lable": "no"}],
        "one": [{"text": "a", "label": 1}, {"text": "b", "label": 1}],
        "half": [{"text": "a", "label": 0.5}],
        "both": [{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": "1"}],
        "nan": [{"text": "a", "label": 0.5}, {"text": "b", "label": float("nan")}],
        "huge": [{"text": "a", "label": 0.5}, {"text": "b", "label": 10**400}],
    }
    files = {name: write_rows(tmp_path / f"{name}.jsonl", some) for name, some in rows.items()}
    for model, changes, message in (
        (diffusion_model, {"test": None}, "needs --understanding.train and --understanding.test"),
        (diffusion_model, {"test": f"{tmp_path}/none.jsonl"}, r"there is no file .*none\.jsonl"),
        (
            diffusion_model,
            {"test": files["other"]},
            r"other\.jsonl, row 2: no training row has the label 'yess'; did you mean 'yes'",
        ),
        (
            diffusion_model,
            {"train": files["bare"]},
            r"bare\.jsonl, row 2 has no field 'label'; did you mean 'lable'",
        ),
        (
            diffusion_model,
            {"train": files["one"]},
            r"one\.jsonl: all rows have the label 1, of which nothing",
        ),
        (
            diffusion_model,
            {"test": files["half"]},
            r"half\.jsonl, row 1: the field 'label' must be str or int",
        ),
        (
            diffusion_model,
            {"train": files["both"]},
            r"both\.jsonl: some rows have the number 1 as their label, some the text '1'",
        ),
        (
            diffusion_model,
            {"train": files["half"], "test": files["nan"], "target": "score"},
            r"nan\.jsonl, row 2: the score is nan, which is no number",
        ),
        (
            diffusion_model,
            {"train": files["half"], "test": files["huge"], "target": "score"},
            r"huge\.jsonl, row 2: the score is 1000*, which is no number",
        ),
        (diffusion_model, {"pair_field": "second"}, "has no field 'second'"),
        (diffusion_model, {"max_length": 65}, "longer than the context of .*, 64"),
        (causal_model, {"pooling": "first"}, "at its first position it has seen nothing of the text"),
    ):
        changed = replace(config, understanding=replace(config.understanding, **changes))  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            measure_understanding(evaluation_of(model, changed))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real text at {SHARED}")
def test_real_reviews_take_the_way(
    tmp_path: Path, save_checkpoint: Callable[..., str], evaluation_of: EvaluationOf
) -> None:
    """NSMC: ratings up to 4 are negative, from 9 on positive, and those between left out."""
    rows = []
    with gzip.open(SHARED / "data/text/nsmc_20k.jsonl.gz", "rt", encoding="utf-8") as stream:
        for line in stream:
            review = json.loads(line)
            rating = int(review["rating"])
            if rating <= 4 or rating >= 9:
                rows.append({"document": review["text"], "label": int(rating >= 9)})
            if len(rows) == 300:
                break
    model = save_checkpoint(tmp_path / "model", context=96)
    understanding = UnderstandingConfig(
        train=write_rows(tmp_path / "train.jsonl", rows[:200]),
        test=write_rows(tmp_path / "test.jsonl", rows[200:]),
        text_field="document",
        num_epochs=1,
        seeds=2,
        pooling="first",
        lr=1e-3,
    )
    figures = measure_understanding(evaluation_of(model, EvaluateConfig(understanding=understanding)))
    assert {f"understanding/{name}" for name in ("accuracy", "f1", "mcc", "majority")} <= set(figures)
    assert 0.3 < figures["understanding/accuracy"] < 1
    assert 0 < figures["understanding/accuracy_stderr"] < 0.06
    assert figures["understanding/texts_cut"] > 0
