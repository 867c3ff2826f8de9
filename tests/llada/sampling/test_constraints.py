"""Tokens that are allowed and forbidden at single positions: what is written heeds them, whatever the rule."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llada.errors import UserError
from llada.model.transformer import Transformer
from llada.sampling.config import SamplingConfig
from llada.sampling.constraints import Constraints, last_position
from llada.sampling.generate import generate, infill
from llada.settings import from_json, to_json

MakeModel = Callable[..., Transformer]
MASK, EOS = 22, 1


def left_at(position: list[int], **settings: Any) -> list[list[int]]:
    """The ids of 8 that may stand at these positions."""
    logits = torch.arange(len(position) * 8, dtype=torch.float32).reshape(-1, 8)
    before = logits.clone()
    constraints = Constraints(SamplingConfig(gen_length=20, **settings), [7], [])
    constraints.rule_out(logits, torch.arange(len(position)), torch.tensor(position))
    kept = logits > -torch.inf
    assert torch.equal(logits[kept], before[kept])
    return [row.nonzero().flatten().tolist() for row in kept]


def test_what_may_stand_where() -> None:
    every = list(range(8))
    assert left_at([0, 1, 2, 19], allowed={1: [3, 5, 3]}, forbidden={2: [0], 0: [6, 7]}) == [
        [0, 1, 2, 3, 4, 5],
        [3, 5],
        [1, 2, 3, 4, 5, 6, 7],
        every,
    ]
    # Everywhere: allowed where nothing else is said, forbidden in any case; in a prompt's hole, too.
    assert left_at([-1, 0, 4], allowed={"*": [2, 3], 4: [5, 2]}, forbidden={"*": [3], 4: [2]}) == [
        [2],
        [2],
        [5],
    ]
    assert left_at([-1, 3, 9], forbidden={"*": [0], 3: [1]}) == [every[1:], every[2:], every[1:]]
    assert left_at([-1, 5], allowed={0: [2]}) == [every, every]


def test_only_the_candidates_that_are_meant_are_touched() -> None:
    logits = torch.zeros(5, 4)
    constraints = Constraints(SamplingConfig(gen_length=9, allowed={2: [1]}, forbidden={3: [0, 2]}), [], [])
    constraints.rule_out(logits, torch.tensor([1, 3]), torch.tensor([3, 2]))
    ruled_out = torch.zeros(5, 4, dtype=torch.bool)
    ruled_out[1, [0, 2]] = True
    ruled_out[3, [0, 2, 3]] = True
    assert torch.equal(logits == -torch.inf, ruled_out)


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"threshold": 0.4},
        {"remasking": "ancestral"},
        {"remdm_cap": 0.5},
        {"p2_eta": 2.0},
        {"remasking": "margin"},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_frame_with_open_slots(make_model: MakeModel, rule: dict, temperature: float) -> None:
    """Fixed tokens, slots with few choices, and the rest free but for what is forbidden everywhere."""
    prompts = [[5, 6], [7], []]
    knobs: dict[str, Any] = {
        "gen_length": 9,
        "block_length": 4,
        "steps": None,
        "temperature": temperature,
        "fixed": {0: 11, 4: 12},
        "allowed": {1: [3, 4], 5: [8], 7: [9, EOS]},
        "forbidden": {"*": [13, 18, 6], 2: [*range(2, 20)]},
        **rule,
    }
    together = generate(make_model(1), prompts, seed=3, eos_id=EOS, **knobs)
    texts = together.sequences[:, 2:]
    assert (texts[:, [0, 4, 5]] == torch.tensor([11, 12, 8])).all()
    assert torch.isin(texts[:, 1], torch.tensor([3, 4])).all()
    assert torch.isin(texts[:, 2], torch.tensor([0, 20, 21])).all()
    assert torch.isin(texts[:, 7], torch.tensor([9, EOS])).all()
    assert not torch.isin(texts, torch.tensor([13, 18, 6, MASK])).any()
    assert not (texts[:, :7] == EOS).any()  # no end before the last slot
    assert (texts[:, 8][texts[:, 7] == EOS] == EOS).all()
    for row, prompt in enumerate(prompts):
        alone = generate(make_model(1), [prompt], seed=3 + row, eos_id=EOS, **knobs)
        assert torch.equal(alone.sequences[0, len(prompt) :], texts[row])


def test_gaps_are_counted_from_the_first_token_of_a_row(make_model: MakeModel) -> None:
    rows = torch.tensor([[0, 0, 5, MASK, MASK], [5, MASK, 4, MASK, 3]])
    shown = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    out = infill(
        make_model(), rows, attention_mask=shown, allowed={1: [9], "*": [10, 11]}, forbidden={3: [10]}
    )
    assert out.sequences[0, 3] == 9
    assert out.sequences[0, 4] in (10, 11)
    assert out.sequences[1, 1] == 9
    assert out.sequences[1, 3] == 11


def test_confidence_is_that_of_what_may_be_written() -> None:
    """A slot with one choice is sure, and comes first."""

    def predict(tokens: Tensor, **_: Tensor) -> Tensor:
        return torch.tensor([3.0, 1.0, 0.0, 0.0]).expand(*tokens.shape, 4)

    knobs: dict[str, Any] = {"gen_length": 3, "steps": 3, "mask_id": 3}
    out = generate(predict, [[0]], allowed={2: [1]}, **knobs)
    assert out.sequences[0, 1:].tolist() == [0, 0, 1]
    assert out.reveal_step.tolist() == [[1, 2, 0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"allowed": {1: [3, 4]}, "forbidden": {1: [3], "*": [4]}},
            "forbidden takes all that allowed leaves at position 1",
        ),
        ({"forbidden": {2: [5]}, "fixed": {2: 5}}, "forbidden names 5, which fixed puts at position 2"),
        ({"forbidden": {"*": [5]}, "fixed": {2: 5}}, "forbidden names 5, which fixed puts at position 2"),
        ({"allowed": {2: [6]}, "fixed": {2: 5}}, "allowed does not name 5, which fixed puts at position 2"),
        ({"allowed": {2: [MASK]}}, "allowed names nothing at position 2 that may stand there"),
        ({"allowed": {"*": [MASK]}}, r"allowed names nothing at position \* that may"),
        ({"allowed": {2: [EOS], 4: [3]}}, "not before position 4"),
        ({"allowed": {2: [EOS]}, "logits_eos_inf": True}, "logits_eos_inf"),
        ({"allowed": {2: [" cat"]}}, "allowed names the text ' cat' at position 2"),
        ({"forbidden": {"*": [" cat"]}}, r"forbidden names the text ' cat' at position \*"),
        ({"allowed": {2: [99]}}, "the token id 99 lies outside"),
        ({"forbidden": {2: [99]}}, "the token id 99 lies outside"),
        ({"forbidden": {3: [*range(22)]}}, "leave no token for position 3"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(make_model: MakeModel, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        generate(make_model(), [[5, 6]], gen_length=6, eos_id=EOS, **settings)
    assert "\n" not in str(caught.value)


def test_what_is_fixed_may_be_among_what_is_allowed(make_model: MakeModel) -> None:
    settings: dict = {"fixed": {1: 5}, "allowed": {1: [5, 6], 2: [6]}, "forbidden": {1: [7]}}
    out = generate(make_model(), [[3]], gen_length=4, eos_id=EOS, **settings)
    assert out.sequences[0, 2:4].tolist() == [5, 6]
    # Which id a text is, and so whether it fits, only a tokenizer knows.
    assert SamplingConfig(gen_length=4, fixed={1: " a"}, allowed={1: [5, 6]}).fixed == {1: " a"}
    with pytest.raises(UserError, match="allowed does not name 7, which fixed puts at position 1"):
        SamplingConfig(gen_length=4, fixed={1: 7}, allowed={1: [5, 6]})


def test_the_last_position_about_which_something_is_said() -> None:
    assert last_position(SamplingConfig()) == 0
    assert last_position(SamplingConfig(allowed={"*": [3]}, forbidden={9: [3]})) == 0
    assert last_position(SamplingConfig(allowed={"*": [3], 4: [5]}, fixed={2: 3})) == 4


def test_positions_survive_json_whose_keys_are_text() -> None:
    config = SamplingConfig(gen_length=8, allowed={0: (" word", 3), "*": (4,)}, forbidden={7: (1,)})
    assert from_json(SamplingConfig, to_json(config)) == config
