"""The average of the weights: its formula, that it is validated and exported, and that runs take it up, lose it, keep it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llada.data.tokens.shards import TokenDataset
from llada.model.transformer import Transformer
from llada.training.ema import WeightAverage, averaged_weights
from llada.training.events import StepSkipped, Validated
from llada.training.validation import Validation

State = dict[str, Tensor]


def average_of(states: list[State], decay: float) -> State:
    """By its definition, in float64: the first step's weights, then the n-th with at most (1 + n) / (10 + n)."""
    mean = {name: value.double() for name, value in states[0].items()}
    for n, state in enumerate(states[1:], start=2):
        kept = min(decay, (1 + n) / (10 + n))
        mean = {name: kept * value + (1 - kept) * state[name] for name, value in mean.items()}
    return mean


def assert_close(a: State, b: State) -> None:
    for name, value in a.items():
        torch.testing.assert_close(value.double(), b[name].double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("decay", [0.2, 0.9999])
def test_an_average_is_its_formula_and_leaves_the_weights_alone(decay: float) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4)
    model.bias.requires_grad_(False)  # such as what stands beside low-rank adapters
    average = WeightAverage(model, decay)
    states = []
    for _ in range(30):
        with torch.no_grad():
            model.weight.copy_(torch.randn(4, 3))
        states.append({"weight": model.weight.detach().clone()})
        average.step()
    with averaged_weights([average]):
        assert_close(average_of(states, decay), {"weight": model.weight})
    assert torch.equal(model.weight, states[-1]["weight"])
    with pytest.raises(ZeroDivisionError), averaged_weights([average]):
        raise ZeroDivisionError
    assert torch.equal(model.weight, states[-1]["weight"])


def test_a_skipped_step_moves_neither_the_average_nor_its_count() -> None:
    model = torch.nn.Linear(3, 4)
    average = WeightAverage(model, 0.9)
    for skipped in (0.0, 1.0, 0.0):
        with torch.no_grad():
            model.weight.add_(1.0 - skipped)
        before = {slot: value.clone() for slot, value in average.state[model.weight].items()}
        average.found_inf = torch.tensor(skipped)
        average.step()
        if skipped:
            with torch.no_grad():
                model.weight.add_(5.0)  # even if the weights had moved
            average.step()
            for slot, value in average.state[model.weight].items():
                assert torch.equal(value, before[slot])
            with torch.no_grad():
                model.weight.sub_(5.0)
    assert average.state[model.weight]["average_updates"] == 2


@pytest.fixture(scope="module")
def steps(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[State], list[float]]:
    """The weights after each of five steps of a run that keeps no average, and its losses."""
    path = tmp_path_factory.mktemp("plain")
    runs = [run_here(make_config(num_steps=5), pretrain_folder, path, stop_at=n) for n in range(1, 6)]
    return [run.state for run in runs], [loss for run in runs for loss in run.losses]


def test_the_average_is_validated_and_exported_and_changes_no_step(
    steps: tuple[list[State], list[float]],
    make_config: Callable,
    run_here: Callable,
    pretrain_folder: Any,
    tmp_path: Path,
) -> None:
    states, losses = steps
    configs = make_config(num_steps=5, ema_decay=0.6)
    run = run_here(configs, pretrain_folder, tmp_path)
    assert run.losses == losses
    expected = average_of(states, 0.6)
    assert_close(expected, run.state)
    model = Transformer(configs[0])
    model.load_state_dict(expected)
    validation = Validation(
        TokenDataset(pretrain_folder.url, "validation"),
        configs[1].objective,
        num_rows=11,
        seed=0,
        micro_rows=8,
    )
    bound = validation(model, torch.device("cpu"), torch.float32)
    assert run.result.validation_loss == pytest.approx(bound, rel=1e-6)
    assert [event.averaged for event in run.events if isinstance(event, Validated)] == [True]


def test_a_run_may_begin_and_end_to_keep_an_average(
    steps: tuple[list[State], list[float]],
    make_config: Callable,
    run_here: Callable,
    pretrain_folder: Any,
    tmp_path: Path,
) -> None:
    states, losses = steps

    def go_on(stop_at: int, ema_decay: float | None) -> Any:
        configs = make_config(num_steps=5, ema_decay=ema_decay)
        return run_here(configs, pretrain_folder, tmp_path, stop_at=stop_at)

    runs = [go_on(1, None), go_on(3, 0.6), go_on(4, 0.9), go_on(5, None)]
    assert [loss for run in runs for loss in run.losses] == losses
    for name, value in runs[-1].state.items():
        assert torch.equal(value, states[-1][name])
    assert_close(average_of(states[1:3], 0.6), runs[1].state)
    # Its last step is the third of the average.
    kept, mean = min(0.9, 4 / 13), average_of(states[1:3], 0.6)
    assert_close(
        {name: kept * value + (1 - kept) * states[3][name] for name, value in mean.items()},
        runs[2].state,
    )


def test_what_is_skipped_is_not_averaged(
    make_config: Callable, run_here: Callable, poisoned: Callable, rare_folder: Any, tmp_path: Path
) -> None:
    folder, rare = rare_folder
    configs = make_config(num_steps=6, ema_decay=0.6)
    initial = poisoned(configs, rare)
    run = run_here(configs, folder, tmp_path / "average", initial_state=initial)
    skipped = [event.step for event in run.events if isinstance(event, StepSkipped)]
    assert skipped == [4]
    plain = make_config(num_steps=6)
    states = [
        run_here(plain, folder, tmp_path / "plain", initial_state=initial, stop_at=n).state
        for n in range(1, 7)
        if n not in skipped
    ]
    expected = average_of(states, 0.6)
    for name, value in run.state.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7, equal_nan=True)
