"""The experiment on little text, as a user runs it, and its sums over all masks and all strings."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from llada.data.tokens.shards import TokenDataset
from llada.model.transformer import Transformer

HERE = Path(__file__).resolve().parent
PLAY = b"".join(
    b"KING:\nThe %s is gone to %s.\n\n" % words for words in [(b"moon", b"sea"), (b"owl", b"bed")] * 80
)


@pytest.fixture(scope="module")
def done(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "tinyshakespeare.txt").write_bytes(PLAY)
    script.main(["--text", str(folder), "--output", str(folder / "out"), "--quick"])
    return folder / "out"


def test_both_twins_have_their_numbers(script: ModuleType, done: Path):
    report = json.loads((done / "bits_per_character.json").read_text())
    assert [row["network"] for row in report["rows"]] == ["autoregressive", "LLaDA"]
    assert report["symbols"] == len(set(PLAY))
    for row in report["rows"]:
        assert all(0.5 < bits < math.log2(report["symbols"] + 2) + 1 for bits in row["bits"])
        assert min(row["toy_bits"]) > report["toy_entropy"]
        # The end of the curve is of other rows, but of the same text.
        for curve, bits in zip(row["curves"], row["bits"], strict=True):
            assert curve[-1][1] / math.log(2) == pytest.approx(bits, rel=0.1)
    assert (done / "bits_per_character.png").stat().st_size > 10_000
    assert "| LLaDA, bound |" in (done / "bits_per_character.md").read_text()


def test_the_last_tenth_is_held_out_and_rates_are_chosen_by_what_is_before_it(script: ModuleType, done: Path):
    def text(split: str) -> bytes:
        dataset = TokenDataset(str(done / "data"), split)
        known = sorted(set(PLAY))
        return bytes(
            known[token - 2] for token in dataset.rows(np.arange(len(dataset))).tokens[:, 1:].ravel()
        )

    border = int(len(PLAY) * 0.9)
    assert PLAY[:border].startswith(text("train") + text("validation"))
    assert PLAY[border:].startswith(text("held_out"))
    assert len(text("train") + text("validation")) > border - 15
    assert len(text("validation")) == script.QUICK.learning.validation_rows * 15
    assert len(text("held_out")) > len(PLAY) - border - 15
    experiment = script.Text(done.parent / "tinyshakespeare.txt", done, script.QUICK)
    assert experiment.held_out.equal(script.rows_of(done / "data", "held_out"))


def test_the_sum_over_masks_is_the_mean_over_orders_of_the_chain_rule(script: ModuleType):
    network = Transformer(
        script.Twins(Path(), Path(), 5, 4, script.Learning(1, 1, (0.1,), d_model=32, num_layers=1)).network(
            "LLaDA"
        )
    )
    network.init_weights(3)
    rows = torch.tensor([[0, 2, 3, 4], [0, 4, 4, 2]])
    total = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for order in itertools.permutations((1, 2, 3)):
            canvas = torch.where(torch.arange(4) > 0, script.MASK, rows)
            for place in order:
                logits = network(canvas)[:, place].double()
                logits[:, script.MASK] = -torch.inf
                total -= logits.log_softmax(-1).gather(1, rows[:, place, None])[:, 0] / math.factorial(3)
                canvas[:, place] = rows[:, place]
    assert script.enumerated_nats(network, rows).tolist() == pytest.approx(total.tolist(), rel=1e-6)


def test_the_toy_language_is_its_chain(script: ModuleType, done: Path):
    toy = script.Toy(done, script.QUICK)
    assert float(toy.p.sum()) == pytest.approx(1.0)
    first = script.stationary(script.TRANSITIONS)
    assert first @ script.TRANSITIONS == pytest.approx(first)
    # H(X₁ … X_T) = H(X₁) + (T − 1) · H(X₂ | X₁).
    step = -(first[:, None] * script.TRANSITIONS * np.log2(script.TRANSITIONS)).sum()
    entropy = (-(first * np.log2(first)).sum() + (script.TOY_LENGTH - 1) * step) / script.TOY_LENGTH
    assert toy.entropy == pytest.approx(entropy)


def test_the_estimate_of_the_bound_is_the_sum_over_masks(script: ModuleType, done: Path):
    (row,) = (
        row for row in json.loads((done / "bits_per_character.json").read_text())["rows"] if "estimate" in row
    )
    for enumerated, estimate, error in zip(
        row["enumerated"], row["estimate"], row["standard_error"], strict=True
    ):
        assert abs(estimate - enumerated) < 4 * error


def test_the_readme_shows_the_committed_result(script: ModuleType):
    report = json.loads((HERE / "results" / "bits_per_character.json").read_text())
    assert script.table(report) in (HERE.parents[1] / "README.md").read_text()
