"""What a rule sees, against the logits that it comes from."""

import math
from collections.abc import Callable

import pytest
import torch

from llada.sampling.candidates import Candidates

MakeCandidates = Callable[..., Candidates]


def test_tables_hold_a_row_each(make_candidates: MakeCandidates) -> None:
    c = make_candidates([[0.6, 0.3, 0.55], [0.8]])
    assert c.exists.tolist() == [[True] * 3, [True, False, False]]
    assert c.confidence.tolist()[0] == pytest.approx([0.6, 0.3, 0.55])
    assert c.confidence.tolist()[1] == pytest.approx([0.8, -math.inf, -math.inf])
    entropy = -sum(p * math.log(p) for p in (0.8, 0.2 * 0.999, 0.2 * 0.001))
    assert float(c.certainty[1, 0]) == pytest.approx(-entropy)
    assert ((c.uniform >= 0) == c.exists).all()


def test_margin_is_the_lead_over_the_next_token(make_candidates: MakeCandidates) -> None:
    c = make_candidates([[0.6, 0.3, 0.55], [0.8]])
    assert c.margin[0].tolist() == pytest.approx([0.6 - 0.4 * 0.999, 0.7 * 0.999 - 0.3, 0.55 - 0.45 * 0.999])
    assert c.margin[1].tolist() == pytest.approx([0.8 - 0.2 * 0.999, -math.inf, -math.inf])
    unsure = make_candidates([[0.9, 0.6]], unsure_ids=torch.tensor([[0], [2]]))
    assert unsure.confidence[0].tolist() == pytest.approx([0.0, 0.6 / (0.6 + 0.4 * 0.999)])
    assert unsure.margin[0, 0] == 0


def test_slack_is_what_a_nat_of_doubt_does(make_candidates: MakeCandidates) -> None:
    """The token's logit moved by the doubt: no score moves further than its slack, to first order."""
    rows, doubt = [[0.02, 0.3, 0.5, 0.9, 0.999]], 1e-5
    c = make_candidates(rows, doubt=torch.full((5,), doubt, dtype=torch.float64))
    for way in (doubt, -doubt):
        logits = c.logits.clone()
        logits[:, 0] += way
        moved = make_candidates(rows, logits=logits)
        for name in ("confidence", "margin", "certainty"):
            change = (getattr(moved, name) - getattr(c, name)).abs()
            assert (change <= getattr(c, f"{name}_slack") * 1.001 + 1e-15).all(), name


def test_some_rows_are_those_rows_alone(make_candidates: MakeCandidates) -> None:
    rows = [[0.6, 0.3], [0.8, 0.1, 0.7, 0.6], [0.5]]
    settings = {"knobs": torch.tensor([[0.1], [0.2], [0.3]]).double(), "step": torch.tensor([3, 4, 5])}
    some = make_candidates(rows, **settings).of_rows(torch.tensor([True, False, True]))
    alone = make_candidates([rows[0], rows[2]])
    assert torch.equal(some.confidence, alone.confidence)
    assert some.shape == (2, 2)
    assert some.column.tolist() == [0, 1, 0]
    assert some.knob.flatten().tolist() == pytest.approx([0.1, 0.3])
    assert some.step.tolist() == [3, 5]
