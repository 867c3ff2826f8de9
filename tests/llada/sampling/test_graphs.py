"""Recorded functions: filled up and cut back, never sharing memory with what they have returned, and only of the weights that were
recorded. On a CPU a step is repeated by running it; what CUDA's graphs make of it is tried where there is a device."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llada.sampling.graphs import SIZES, Recorded, Recorder, Step, capture_on


def run_again(step: Step) -> Step:
    return step


class Layer(nn.Module):
    """Two results of different shapes for each token, and how many tokens each run had."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1).requires_grad_(False)
        self.runs: list[int] = []

    def both(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        self.runs.append(len(x))
        return (x[:, None] * turn) * self.scale.weight[0, 0], x + 1

    def one(self, x: Tensor) -> Tensor:
        return x * self.scale.weight[0, 0]


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randn(count, 3, 1, generator=generator)


def build(capture: Callable[[Step], Step] = run_again) -> tuple[Layer, Recorded]:
    layer = Layer()
    recorded = Recorded(Recorder(capture), "both", layer, layer.both, tokens(5))
    layer.runs.clear()
    return layer, recorded


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 128, 129, 256, 257, 1000])
def test_tokens_are_filled_up_and_cut_back(count: int) -> None:
    layer, recorded = build()
    for seed in range(2):  # the second run finds what the first has left
        given = tokens(count, seed)
        found = recorded(*given)
        for one, two in zip(found, layer.both(*given), strict=True):
            assert torch.equal(one, two)
    size = next((size for size in SIZES if count <= size), count)
    assert layer.runs == [size, count] * 2


def test_what_was_returned_is_not_written_over() -> None:
    layer, recorded = build()
    first, second = recorded(*tokens(64, 1)), recorded(*tokens(64, 2))
    for seed, found in ((1, first), (2, second)):
        for one, two in zip(found, layer.both(*tokens(64, seed)), strict=True):
            assert torch.equal(one, two)


def test_each_size_is_recorded_once_and_layers_share_the_memory() -> None:
    steps: list[Step] = []

    def capture(step: Step) -> Step:
        steps.append(step)
        return step

    recorder, layers = Recorder(capture), [Layer(), Layer(), Layer()]
    recorded = [Recorded(recorder, "both", layer, layer.both, tokens(5)) for layer in layers]
    assert len(steps) == len(layers) * len(SIZES)
    for _ in range(3):
        for run in recorded:
            run(*tokens(9))
    assert len(steps) == len(layers) * len(SIZES)
    buffers = {id(recording.output) for run in recorded for _, recording in run._sizes}
    assert len(buffers) == len(SIZES)


def test_a_single_result_is_no_tuple() -> None:
    layer = Layer()
    recorded = Recorded(Recorder(run_again), "one", layer, layer.one, tokens(5)[:1])
    x = tokens(7)[0]
    assert torch.equal(recorded(x), layer.one(x))


def test_other_weights_and_another_precision_are_not_those_recorded() -> None:
    layer, recorded = build()
    recorded(*tokens(9))
    with torch.no_grad():
        layer.scale.weight.add_(1)  # where it was
    recorded(*tokens(9))
    layer.scale.weight = nn.Parameter(torch.full((1, 1), 3.0), requires_grad=False)
    found = recorded(*tokens(9))
    recorded(*(x.double() for x in tokens(9)))
    assert layer.runs == [64, 64, 9, 9]
    assert torch.equal(found[0], layer.both(*tokens(9))[0])


def test_threads_do_not_get_each_others_results() -> None:
    layer, recorded = build()
    wrong: list[int] = []

    def work(seed: int) -> None:
        given = tokens(40, seed)
        expected = (given[0][:, None] * given[1]) * layer.scale.weight[0, 0]
        for _ in range(200):
            if not torch.equal(recorded(*given)[0], expected):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_graphs_repeat_what_was_recorded() -> None:
    device = torch.device("cuda")
    layer = Layer().to(device)
    example = tuple(x.to(device) for x in tokens(5))
    recorded = Recorded(Recorder(capture_on(device)), "both", layer, layer.both, example)
    layer.runs.clear()
    for count in (1, 64, 100, 256):
        given = tuple(x.to(device) for x in tokens(count, count))
        found = [recorded(*given) for _ in range(2)]
        assert layer.runs == []
        for results in found:
            for one, two in zip(results, layer.both(*given), strict=True):
                assert torch.equal(one, two)
        layer.runs.clear()
    with torch.cuda.stream(torch.cuda.Stream()):
        recorded(*given)
    assert layer.runs == [256]  # other work's order is not that of the recording
