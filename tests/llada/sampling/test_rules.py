"""The rules that choose positions, against their definitions spelled out by brute force."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llada.errors import UserError
from llada.model.transformer import Transformer
from llada.sampling import rules
from llada.sampling.candidates import Candidates
from llada.sampling.canvas import prompt_canvas
from llada.sampling.config import SamplingConfig
from llada.sampling.generate import generate
from llada.sampling.rules import (
    _RULES,
    RULES,
    Rule,
    above,
    by_entropy,
    by_error,
    by_factor,
    by_leap,
    by_planning,
    find_rule,
    highest,
)
from llada.sampling.sampler import denoise

confidences = st.lists(st.floats(0, 1, allow_nan=False, width=32), min_size=1, max_size=12, unique=True).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)
# Multiples of 1/64: sums are exact, so that "≤ bound" does not hang on rounding.
entropies = st.lists(st.integers(0, 256), min_size=1, max_size=12, unique=True).map(
    lambda values: torch.tensor(values, dtype=torch.float64) / 64
)
MakeCandidates = Callable[..., Candidates]
MakeModel = Callable[..., Transformer]
quick = settings(max_examples=150, deadline=None, derandomize=True)


def positions(chosen: Tensor) -> set[int]:
    """Of a table of one row."""
    (row,) = chosen
    return set(row.nonzero().flatten().tolist())


def padded(values: Tensor) -> Tensor:
    """A table of one row, with two empty slots behind its candidates."""
    return torch.nn.functional.pad(values[None], (0, 2), value=-torch.inf)


@given(confidences, st.integers(1, 15))
@quick
def test_highest_takes_the_most_confident(confidence: Tensor, quota: int) -> None:
    chosen = positions(highest(padded(confidence), torch.tensor([min(quota, len(confidence))])))
    assert len(chosen) == min(quota, len(confidence))
    left_out = set(range(len(confidence))) - chosen
    assert all(confidence[i] > confidence[j] for i in chosen for j in left_out)


@given(confidences, st.floats(0, 1.2))
@quick
def test_above_is_its_definition(confidence: Tensor, threshold: float) -> None:
    expected = {i for i, c in enumerate(confidence.tolist()) if c >= threshold} or {int(confidence.argmax())}
    assert positions(above(padded(confidence), threshold)) == expected


@given(confidences, st.floats(0, 3))
@quick
def test_by_factor_is_its_definition(confidence: Tensor, factor: float) -> None:
    ranked = sorted(range(len(confidence)), key=lambda i: -float(confidence[i]))
    n = 1
    while n < len(ranked) and float(confidence[ranked[n]]) >= 1 - factor / (n + 2):
        n += 1
    assert positions(by_factor(padded(confidence), factor)) == set(ranked[:n])


@given(entropies, st.integers(0, 400).map(lambda n: n / 64))
@quick
def test_by_entropy_is_its_definition(entropy: Tensor, bound: float) -> None:
    ranked = sorted(range(len(entropy)), key=lambda i: float(entropy[i]))
    fits = [k for k in range(1, len(ranked) + 1) if sum(float(entropy[i]) for i in ranked[: k - 1]) <= bound]
    assert positions(by_entropy(padded(-entropy), bound)) == set(ranked[: max(fits)])


@given(entropies, st.integers(0, 400).map(lambda n: n / 64))
@quick
def test_by_error_is_its_definition(missing: Tensor, bound: float) -> None:
    confidence = 1 - missing / 256
    ranked = sorted(range(len(confidence)), key=lambda i: -float(confidence[i]))
    fits = [
        k for k in range(1, len(ranked) + 1) if sum(1 - float(confidence[i]) for i in ranked[:k]) <= bound
    ]
    assert positions(by_error(padded(confidence), bound)) == set(ranked[: max([1, *fits])])


def test_by_error_bounds_what_is_written_together() -> None:
    """Of any joint distribution with the network's marginals, what is committed has at least 1 − bound."""
    generator = torch.Generator().manual_seed(0)
    together = 0
    for _ in range(300):
        joint = torch.rand(3, 3, 3, 3, generator=generator, dtype=torch.float64) ** 60
        joint /= joint.sum()
        marginals = [joint.sum([axis for axis in range(4) if axis != i]) for i in range(4)]
        confidence, tokens = torch.stack(marginals).max(1)
        for bound in (0.1, 0.4):
            chosen = sorted(positions(by_error(padded(confidence), bound)))
            if len(chosen) < 2:
                continue
            together += 1
            others = [axis for axis in range(4) if axis not in chosen]
            joint_of_chosen = joint.sum(others) if others else joint  # no axes would be all of them
            own = joint_of_chosen[tuple(tokens[chosen].tolist())]
            assert float(own) >= 1 - bound - 1e-12
            assert float(own) == float(joint_of_chosen.max())  # the likeliest combination
    assert together > 50


def test_margin_takes_the_clearest(make_candidates: MakeCandidates) -> None:
    # The second's token is not the likeliest: surest of all, but of something else; the confidence would call it last.
    c = make_candidates([[0.6, 0.3, 0.55], [0.8]])
    assert RULES["margin"].choose(c).tolist() == [[False, True, False], [True, False, False]]
    # An end that has no confidence comes last, whatever it leads by.
    none = make_candidates([[0.9, 0.6]], unsure_ids=torch.tensor([[0], [2]]))
    assert RULES["margin"].choose(none).tolist() == [[False, True]]
    # Near ties: the lower column.
    tie = make_candidates([[0.7, 0.7 + 1e-9]], doubt=torch.full((2,), 1e-6, dtype=torch.float64))
    assert RULES["margin"].choose(tie).tolist() == [[True, False]]
    clear = make_candidates([[0.7, 0.7 + 1e-5]], doubt=torch.full((2,), 1e-6, dtype=torch.float64))
    assert RULES["margin"].choose(clear).tolist() == [[False, True]]


def leap_by_hand(
    values: list[float], columns: list[int], relaxed: float, high: float, radius: int
) -> set[int]:
    anchors = [c for v, c in zip(values, columns, strict=True) if v >= high]
    near = [any(abs(c - a) <= radius for a in anchors) for c in columns]
    chosen = {i for i, v in enumerate(values) if v >= high or (near[i] and v >= relaxed)}
    return chosen or {max(range(len(values)), key=lambda i: values[i])}


@given(
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=12, unique=True),
    st.floats(0.1, 0.7),
    st.floats(0.7, 0.95),
    st.integers(0, 4),
    st.integers(0, 3),
)
@quick
def test_by_leap_is_its_definition(
    make_candidates: MakeCandidates, values: list[float], relaxed: float, high: float, radius: int, gap: int
) -> None:
    """Distances count positions, also over tokens that are committed already."""
    columns = [5 + slot + gap * (slot > 2) for slot in range(len(values))]
    c = make_candidates(
        [values, [0.5]],
        column=torch.tensor([*columns, 0]),
        knobs=torch.tensor([[relaxed, high, radius], [0.1, 0.9, 4.0]], dtype=torch.float64),
    )
    exact = c.confidence[0, : len(values)].tolist()  # what has become of the values in logarithms
    assert positions(by_leap(c)[:1]) == leap_by_hand(exact, columns, relaxed, high, radius)
    assert by_leap(c)[1].tolist() == [True] + [False] * (len(values) - 1)


def test_by_planning_keeps_the_share_that_is_due(make_candidates: MakeCandidates) -> None:
    """After step i of S the i/S most confident are kept, those committed before among them at η times their log."""
    values = [0.9, 0.2, 0.6, 0.5, 0.7, 0.4]
    held = torch.tensor([False, True, False, True, False, False])
    for step, kept in ((0, 2), (1, 4), (2, 6)):
        for eta, scores in (
            (1.0, values),
            (0.0, [0.9, 1.0, 0.6, 1.0, 0.7, 0.4]),
            (2.0, [0.9, 0.2**2, 0.6, 0.5**2, 0.7, 0.4]),
        ):
            c = make_candidates(
                [values],
                is_held=held,
                step=torch.tensor([step]),
                steps=torch.tensor([3]),
                knobs=torch.tensor([[eta]], dtype=torch.float64),
            )
            ranked = sorted(range(6), key=lambda i: -scores[i])
            assert positions(by_planning(c)) == set(ranked[:kept])


def test_p2_corrects_what_it_has_written() -> None:
    """A network that sees only later that its first token was wrong: it is masked again, and becomes another."""

    def predict(tokens: Tensor, **_: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 5)
        for row, line in enumerate(tokens.tolist()):
            logits[row, 0, 1 if line[1] == 4 else 2] = (
                3.0  # the first is 1, until the second is known to be 3
            )
            logits[row, 0, 3] = 0.0
            logits[row, 1:, 3] = torch.tensor([2.0, 1.0, 0.5])
        return logits

    start = torch.empty(1, 0).long()
    knobs: dict[str, Any] = {"gen_length": 4, "steps": 4, "block_length": 4, "mask_id": 4}
    fixed = generate(predict, start, **knobs)
    assert fixed.sequences.tolist() == [[1, 3, 3, 3]]
    free = generate(predict, start, p2_eta=1.0, **knobs)
    assert free.sequences.tolist() == [[2, 3, 3, 3]]
    assert free.nfe == 4
    assert free.reveal_step[0, 0] > 0  # of its last commit
    stays = generate(predict, start, p2_eta=0.0, **knobs)
    assert torch.equal(stays.sequences, fixed.sequences)
    assert torch.equal(stays.reveal_step, fixed.reveal_step)


@pytest.mark.parametrize("rule", [{"remdm_cap": 1.0, "temperature": 0.0}, {"p2_eta": 1.0}], ids=str)
def test_an_end_stays_and_what_stands_behind_it_is_settled(rule: dict[str, Any]) -> None:
    """EOS at the fourth place, so sure that it comes first; before it tokens come and go, behind it nothing does."""

    def predict(tokens: Tensor, **_: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 6)
        logits[:, 3, 1] = 9.0
        logits[..., 2] = (
            torch.rand(tokens.shape, generator=torch.Generator().manual_seed(int(tokens.sum()))) * 3
        )
        return logits

    seen_end = 0
    for seed in range(6):
        config = SamplingConfig(10, 6, 10, **rule)
        canvas = prompt_canvas([[]], config, mask_id=5, eos_id=1, seed=seed)
        has_ended = False
        for _ in denoise(predict, canvas):
            line = canvas.tokens[0].tolist()
            if has_ended:
                seen_end += 1
                assert line[3] == 1
                assert 5 not in line[3:]
            has_ended = line[3] == 1
        assert canvas.tokens[0, 3:].tolist() == [1] * 7
        assert 5 not in canvas.tokens[0].tolist()
        assert (canvas.reveal_step[0, :4] >= 0).all()
        assert (canvas.reveal_step[0, 4:] == -1).all()
        assert canvas.nfe <= 6
    assert seen_end > 3


def test_rules_say_whether_they_may_remask() -> None:
    assert {name for name, rule in RULES.items() if rule.may_remask} == {"remdm", "p2"}


def test_the_table_for_readers_is_the_one_for_machines() -> None:
    table = (rules.__doc__ or "").split("\n\n")[1].splitlines()[1:]
    lines = {line.split()[0]: line for line in table}
    assert set(lines) == set(_RULES)
    assert all(rule.knob in (None, lines[name].split()[1]) for name, rule in _RULES.items())


def test_rules_on_worked_examples() -> None:
    confidence = torch.tensor([0.2, 0.99, 0.7, 0.65])
    assert positions(by_factor(padded(confidence), 1.0)) == {1, 2}  # 0.7 ≥ 1 − 1/3, 0.65 < 1 − 1/4
    assert positions(by_factor(torch.tensor([[0.99, 0.2]]), 1.0)) == {0}  # the last failing rank stays out
    assert positions(by_factor(torch.tensor([[0.1, 0.2]]), 0.0)) == {1}
    assert positions(above(padded(confidence), 0.7 - 1e-6)) == {1, 2}
    entropy = torch.tensor([0.5, 0.125, 2.0, 0.25])
    assert positions(by_entropy(padded(-entropy), 0.0)) == {1}
    assert positions(by_entropy(padded(-entropy), 0.125)) == {1, 3}
    assert positions(by_entropy(padded(-entropy), 0.375)) == {1, 3, 0}
    assert positions(by_entropy(padded(-entropy), 0.874)) == {1, 3, 0}
    assert positions(by_entropy(padded(-entropy), 0.875)) == {0, 1, 2, 3}


def test_rows_of_a_table_do_not_see_each_other() -> None:
    """Each rule on a ragged table is the rule on its rows alone; of equals the lower column is taken."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(n, generator=generator, dtype=torch.float64) for n in (1, 7, 4, 12)]
    rows.append(torch.full((5,), 0.5, dtype=torch.float64))
    table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-torch.inf)
    quota = torch.tensor([1, 3, 2, 5, 2])
    for rule in (
        lambda t, q: highest(t, q),
        lambda t, _: above(t, 0.6),
        lambda t, _: by_factor(t, 0.8),
        lambda t, _: by_entropy(t - 1, 0.4),
        lambda t, _: by_error(t, 0.7),
    ):
        together = rule(table, quota)
        for r, row in enumerate(rows):
            assert torch.equal(together[r, : len(row)], rule(row[None], quota[r : r + 1])[0])
    assert positions(highest(rows[4][None], quota[4:])) == {0, 1}


def test_settings_find_their_rule() -> None:
    assert find_rule(SamplingConfig()) is RULES["low_confidence"]
    assert find_rule(SamplingConfig(threshold=0.9)) is RULES["threshold"]
    assert find_rule(SamplingConfig(threshold=0.9, remasking="threshold")) is RULES["threshold"]
    assert find_rule(SamplingConfig(entropy_bound=0.0)) is RULES["entropy"]
    for bad, message in (
        ({"remasking": "low_confidense"}, "did you mean 'low_confidence'"),
        ({"remasking": "factor"}, "remasking='factor' needs the setting factor"),
        ({"threshold": 0.9, "factor": 1.0}, "threshold and factor"),
        ({"factor": 1.0, "remasking": "random"}, "choose one rule"),
        ({"threshold": float("nan")}, "threshold must be a finite number"),
    ):
        with pytest.raises(UserError, match=message):
            SamplingConfig(**bad)


def test_a_rule_named_beside_its_knob_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """One from outside may share the knob of one of ours."""
    monkeypatch.setattr(RULES, "_entries", dict(RULES._entries))
    mine = RULES.register("mine")(Rule(lambda c: c.confidence >= c.knob, knob="threshold"))
    assert find_rule(SamplingConfig(remasking="mine", threshold=0.9)) is mine
    assert find_rule(SamplingConfig(threshold=0.9)) is RULES["threshold"]


@pytest.mark.parametrize("rule", [{"remdm_cap": 0.5}, {"p2_eta": 2.0}], ids=str)
@pytest.mark.parametrize("cache", ["prefix", "dual", "vicinity"])
def test_tokens_that_come_and_go_are_fed_again(
    make_model: MakeModel, rule: dict[str, Any], cache: str
) -> None:
    """They do so within the block, which every cache feeds: refreshed each time, it changes nothing."""
    model, prompts = make_model(3), [[5, 6, 7], [9]]
    knobs: dict[str, Any] = {"gen_length": 12, "block_length": 6, "steps": 12, "seed": 2, "eos_id": 1, **rule}
    plain = generate(model, prompts, **knobs)
    exact = generate(model, prompts, cache=cache, refresh_every=1, **knobs)
    assert torch.equal(plain.sequences, exact.sequences)
    assert torch.equal(plain.reveal_step, exact.reveal_step)
    approximate = generate(model, prompts, cache=cache, **knobs)
    assert approximate.token_forwards < plain.token_forwards or cache == "vicinity"
    assert not (approximate.sequences == 22).any()


def test_more_steps_than_masks_are_more_chances_to_correct(make_model: MakeModel) -> None:
    model = make_model(1)
    for rule in ({"remdm_cap": 0.9}, {"p2_eta": 3.0}):
        out = generate(model, [[5, 6]], gen_length=6, steps=24, block_length=6, seed=0, **rule)
        assert 6 < out.nfe <= 24
        assert not (out.sequences == 22).any()


def test_leftmost_goes_from_left_to_right(make_model: MakeModel) -> None:
    out = generate(make_model(), [[3, 4]], gen_length=7, steps=4, block_length=64, remasking="leftmost")
    assert out.reveal_step.tolist() == [[0, 0, 1, 1, 2, 2, 3]]
