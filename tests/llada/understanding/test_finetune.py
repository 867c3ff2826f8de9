"""Fine-tuning: an easy task is learned, by every kind of network, and a seed repeats it to the bit."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from llada.errors import UserError
from llada.model.transformer import ModelConfig, Transformer
from llada.understanding.classifier import Classifier
from llada.understanding.config import UnderstandingConfig
from llada.understanding.finetune import answers, finetune, loss_of

CONFIG = UnderstandingConfig(num_epochs=10, batch_rows=16, lr=3e-3)


def model_of(num_outputs: int = 2, seed: int = 0, **changes: object) -> Classifier:
    network = Transformer(ModelConfig(20, 16, 1, 2, 32, max_length=12, mask_token_id=1, **changes))  # type: ignore[arg-type]
    network.init_weights(3)
    return Classifier(network, num_outputs, "last" if changes.get("causal") else "mean", seed)


def rows_of(count: int, seed: int) -> tuple[list[list[int]], list[float]]:
    """Rows of noise; the class is whether a 2 stands among it."""
    draw = random.Random(seed)
    rows = [[draw.randrange(3, 20) for _ in range(draw.randint(3, 10))] for _ in range(count)]
    labels = [float(number % 2) for number in range(count)]
    for row, label in zip(rows, labels, strict=True):
        if label:
            row[draw.randrange(len(row))] = 2
    return rows, labels


@pytest.mark.parametrize(
    "changes",
    [{}, {"causal": True}, pytest.param({"tie_embeddings": True}, marks=pytest.mark.slow)],
    ids=str,
)
def test_an_easy_task_is_learned(changes: dict[str, object]) -> None:
    model = model_of(**changes)
    rows, labels = rows_of(300, 1)
    losses = finetune(model, rows, labels, CONFIG, seed=0)
    assert len(losses) == round(10 * 300 / 16)
    assert losses[0] == pytest.approx(math.log(2), abs=0.05)
    unseen, wanted = rows_of(200, 2)
    right = [a == b for a, b in zip(answers(model, unseen, CONFIG), wanted, strict=True)]
    assert sum(right) / 200 > 0.9


def test_a_score_is_learned() -> None:
    model = model_of(1)
    config = replace(CONFIG, target="score")
    rows, _ = rows_of(300, 1)
    labels = [sum(token > 10 for token in row) / len(row) for row in rows]
    finetune(model, rows, labels, config, seed=0)
    unseen, _ = rows_of(100, 2)
    wanted = torch.tensor([sum(token > 10 for token in row) / len(row) for row in unseen])
    found = torch.tensor(answers(model, unseen, config))
    assert float(torch.corrcoef(torch.stack([found, wanted]))[0, 1]) > 0.8


def test_a_seed_repeats_and_another_does_not() -> None:
    rows, labels = rows_of(64, 1)
    runs = []
    for seed in (1, 1, 2):
        model = model_of(seed=seed)
        runs.append((finetune(model, rows, labels, replace(CONFIG, num_epochs=1), seed), model.head.weight))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert torch.equal(runs[0][1], runs[1][1])
    # All of the network moves, not the head alone.
    before = dict(model_of().network.named_parameters())
    still = [name for name, now in model.network.named_parameters() if torch.equal(now, before[name])]
    assert still == ["lm_head.weight"]


def test_the_losses_are_means() -> None:
    outputs, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0.0, 0.0])
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.e)) / 2
    assert float(loss_of(outputs, labels, CONFIG)) == pytest.approx(expected, rel=1e-6)
    score = replace(CONFIG, target="score")
    assert float(loss_of(torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 1.0]), score)) == 2.5


def test_a_loss_that_is_no_number_is_one_line() -> None:
    rows, labels = rows_of(32, 1)
    model = model_of()
    with torch.no_grad():
        model.head.weight[0, 0] = math.inf
    with pytest.raises(UserError, match=r"no finite number at step 0: set a lower --understanding\.lr"):
        finetune(model, rows, labels, CONFIG, seed=0)
