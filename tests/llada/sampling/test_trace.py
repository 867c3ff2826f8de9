"""What a traced row keeps, in columns and through a join with others. (How it is used: test_engine.py.)"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from llada.model.transformer import Transformer
from llada.sampling.canvas import Canvas, prompt_canvas
from llada.sampling.config import SamplingConfig
from llada.sampling.sampler import denoise
from llada.sampling.trace import log_prob_of, read_trace

MASK, EOS = 22, 1


def test_each_row_keeps_what_it_was_asked_to(make_model: Callable[..., Transformer]) -> None:
    config = SamplingConfig(6, 3, 4, fixed={1: 5})
    canvases = [
        prompt_canvas(
            [[3] * length], config, mask_id=MASK, is_traced=num_top is not None, num_top=num_top or 0
        )
        for length, num_top in ((2, 3), (4, None), (3, 0))
    ]
    canvas = Canvas.join(canvases)
    for _ in denoise(make_model(), canvas):
        pass
    canvas = canvas.take([2, 0])
    for row, length, num_top in ((0, 3, 0), (1, 2, 3)):
        trace = read_trace(canvas, row, length, length + 6)
        assert trace.blocks == (0, 0, 0, 0, 1, 1)
        assert trace.steps[1] is trace.confidences[1] is None
        assert sorted(step for step in trace.steps if step is not None) == [0, 0, 1, 2, 2]
        assert [len(top) for top in trace.tops] == [num_top * (step is not None) for step in trace.steps]
        for token, sure, top in zip(
            canvas.tokens[row, length : length + 6].tolist(), trace.confidences, trace.tops, strict=True
        ):
            if top and sure is not None:  # greedy: the likeliest is what was written
                assert top[0][0] == token
                assert top[0][1] == pytest.approx(math.log(sure), rel=1e-6)
                assert list(top) == sorted(top, key=lambda pair: -pair[1])


def test_the_logarithm_of_nothing_is_a_number() -> None:
    assert log_prob_of(0.5) == math.log(0.5)
    assert -1000 < log_prob_of(0.0) < -600
