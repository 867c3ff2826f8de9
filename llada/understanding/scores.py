"""GLUE's measures of answers, and how far they would move with other rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from llada.errors import UserError
from llada.understanding.config import Target

RESAMPLES = 200
"""Of the test rows, from which standard errors are told."""


def measures(target: Target, num_classes: int) -> dict[str, Callable[[np.ndarray, np.ndarray], float]]:
    """{name: function of (labels (N,), answers (N,))}: accuracy, F1 (of the second class of two, as GLUE's 1; of more their mean) and
    Matthews' correlation; of scores Pearson's and Spearman's. What is not defined, where all answers are one, is 0.

    Raises UserError where scikit-learn is not installed.
    """
    try:
        from scipy.stats import pearsonr, spearmanr
        from sklearn.metrics import f1_score, matthews_corrcoef
    except ImportError:
        raise UserError("GLUE's measures need scikit-learn: pip install 'llada-pipelines[eval]'") from None
    if target == "score":
        return {
            "pearson": lambda labels, answers: _defined(pearsonr, labels, answers),
            "spearman": lambda labels, answers: _defined(spearmanr, labels, answers),
        }
    average = "binary" if num_classes == 2 else "macro"
    return {
        "accuracy": lambda labels, answers: float((labels == answers).mean()),
        "f1": lambda labels, answers: float(f1_score(labels, answers, average=average, zero_division=0)),
        "mcc": lambda labels, answers: float(matthews_corrcoef(labels, answers)),
    }


def _defined(
    correlation: Callable[..., tuple[float, float]], labels: np.ndarray, answers: np.ndarray
) -> float:
    return 0.0 if np.ptp(labels) == 0 or np.ptp(answers) == 0 else float(correlation(labels, answers)[0])


def score_answers(
    labels: Sequence[float], answers: Sequence[Sequence[float]], target: Target, num_classes: int
) -> dict[str, float]:
    """{"accuracy": the mean over the fine-tunings, "accuracy_stderr": its standard error by other rows (a bootstrap),
    "accuracy_seed_stderr": by other seeds, …}; of one row, and of one seed, there is no such error.

    Args:
        answers: (S, N), of each fine-tuning.
    """
    right, given = np.asarray(labels), np.asarray(answers)
    draw = np.random.default_rng(0)
    samples = draw.integers(len(right), size=(RESAMPLES, len(right)))
    figures: dict[str, float] = {}
    for name, measure in measures(target, num_classes).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rows that all have one label
            by_seed = np.array([measure(right, row) for row in given])
            others = [np.mean([measure(right[some], row[some]) for row in given]) for some in samples]
        figures[name] = float(by_seed.mean())
        if len(right) > 1:
            figures[f"{name}_stderr"] = float(np.std(others, ddof=1))
        if len(given) > 1:
            figures[f"{name}_seed_stderr"] = float(by_seed.std(ddof=1) / len(given) ** 0.5)
    return figures
