"""What a caller from Python may say to `generate` and `infill`, what is refused, and what comes back."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from llada.errors import UserError
from llada.model.transformer import Transformer
from llada.sampling.config import SamplingConfig
from llada.sampling.generate import generate, infill

MakeModel = Callable[..., Transformer]
RandomPrompt = Callable[..., Tensor]
MASK, EOS = 22, 1


def test_seeds_make_rows_independent_and_repeatable(
    make_model: MakeModel, random_prompt: RandomPrompt
) -> None:
    model, prompt = make_model(), random_prompt(1, 3).expand(4, -1)
    settings: dict = {"gen_length": 8, "steps": 8, "block_length": 8, "temperature": 4.0}
    first = generate(model, prompt, seed=5, **settings).sequences
    assert torch.equal(generate(model, prompt, seed=5, **settings).sequences, first)
    assert torch.equal(generate(model, prompt, seed=[5, 6, 7, 8], **settings).sequences, first)
    assert len({tuple(row) for row in first.tolist()}) == 4  # 23⁸ texts at this temperature
    assert not torch.equal(generate(model, prompt, seed=50, **settings).sequences, first)
    with pytest.raises(ValueError, match="2 seeds for 4 rows"):
        generate(model, prompt, seed=[1, 2], **settings)


def test_a_network_with_a_shift_writes_what_its_logits_say(make_model: MakeModel) -> None:
    """Whole rows at a time: as the network without it, whose logits somebody moves by one position."""
    shifted, plain = make_model(2, shift=True), make_model(2)

    def moved(tokens: torch.Tensor) -> torch.Tensor:
        logits = plain(tokens)
        return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)

    settings: dict = {"gen_length": 8, "steps": 4, "block_length": 4, "cfg_scale": 0.5}
    prompts = [[3, 4, 5], [6]]
    out = generate(shifted, prompts, **settings)
    assert torch.equal(out.sequences, generate(moved, prompts, mask_id=MASK, eos_id=1, **settings).sequences)
    assert not torch.equal(out.sequences, generate(plain, prompts, **settings).sequences)
    with pytest.raises(
        UserError, match="cache, .*leave them out for a plain function and a network with a shift"
    ):
        generate(shifted, prompts, cache="dual", **settings)


def test_infill_fills_the_holes_and_nothing_else(
    make_model: MakeModel, random_prompt: RandomPrompt, keeping_rule: dict
) -> None:
    model = make_model(4)
    tokens = random_prompt(3, 12)
    holes = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    holes[2] = False
    holed = tokens.masked_fill(holes, MASK)
    for block_length in (None, 5):
        out = infill(model, holed, steps=4, block_length=block_length, seed=0, **keeping_rule)
        assert torch.equal(out.sequences[~holes], tokens[~holes])
        assert not (out.sequences == MASK).any()
        assert torch.equal(out.reveal_step >= 0, holes)
    assert holed[holes].unique().tolist() == [MASK]  # the input is untouched
    nothing = infill(model, tokens, steps=4)
    assert nothing.nfe == nothing.token_forwards == 0
    assert torch.equal(nothing.sequences, tokens)
    best = infill(model, holed[:1], steps=1)
    logits = model(holed[:1])[0]
    logits[:, MASK] = -torch.inf
    assert torch.equal(best.sequences[0][holes[0]], logits.argmax(-1)[holes[0]])


def test_holes_in_the_prompt_are_filled_with_the_first_block(make_model: MakeModel) -> None:
    prompt = torch.tensor([[5, MASK, 6]])
    out = generate(make_model(), prompt, gen_length=4, steps=4, block_length=2)
    assert not (out.sequences == MASK).any()
    assert out.sequences[0, [0, 2]].tolist() == [5, 6]
    assert out.reveal_step.shape == (1, 4)


def test_ragged_prompts_work_when_zero_is_the_mask() -> None:
    """Padding must not be taken for a hole, whichever id the mask has."""

    def predict(tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return torch.arange(4.0).expand(*tokens.shape, 4)

    out = generate(predict, [[1, 2, 3], [2]], gen_length=2, steps=2, block_length=2, mask_id=0)
    assert out.sequences[0].tolist() == [1, 2, 3, 3, 3]
    assert out.sequences[1, 2:].tolist() == [2, 3, 3]
    assert out.sequences[1, :2].tolist() == [1, 1]  # padding, not an answer
    assert out.reveal_step.sort(1).values.tolist() == [[0, 1], [0, 1]]
    padded = torch.tensor([[0, 0, 2]])
    with pytest.raises(ValueError, match="padding"):
        generate(predict, padded, attention_mask=torch.tensor([[0, 0, 1]]), gen_length=2, mask_id=0)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"gen_length": 0},
        {"block_length": -1},
        {"temperature": -0.1},
        {"cfg_scale": -1.0},
        {"remasking": "lowest"},
        {"threshold": 0.9, "factor": 1.0},
        {"threshold": 0.9, "remasking": "random"},
        {"schedule": "none"},
    ],
    ids=str,
)
def test_contradictory_knobs_are_refused(
    make_model: MakeModel, random_prompt: RandomPrompt, bad: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        generate(make_model(), random_prompt(1, 2), **{"gen_length": 4, "steps": 4, **bad})


def test_a_model_without_mask_id_needs_one(make_model: MakeModel, random_prompt: RandomPrompt) -> None:
    model = make_model(mask_token_id=None)
    with pytest.raises(ValueError, match="mask_id"):
        generate(model, random_prompt(1, 2), gen_length=2, steps=2)
    out = generate(model, random_prompt(1, 2), gen_length=2, steps=2, mask_id=MASK)
    assert not (out.sequences == MASK).any()


def test_a_network_that_restores_no_masks_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(UserError, match=r"autoregressive \(causal\): it restores no masks"):
        generate(make_model(causal=True), [[3]], gen_length=4)


def test_too_long_a_canvas_is_refused(make_model: MakeModel, random_prompt: RandomPrompt) -> None:
    with pytest.raises(
        UserError, match=r"canvas of 49 tokens.*context length of 48: at most gen_length=8 fits"
    ):
        generate(make_model(), random_prompt(1, 40), gen_length=9, steps=1)
    with pytest.raises(UserError, match="shorten what is given"):
        generate(make_model(), random_prompt(1, 48), gen_length=1)


def test_fewer_steps_than_blocks_with_masks_are_refused(
    make_model: MakeModel, random_prompt: RandomPrompt
) -> None:
    """The blocks that count are those with masks: of a row with gaps, of a text with fixed tokens."""
    knobs: dict[str, Any] = {"gen_length": 12, "block_length": 4}
    with pytest.raises(UserError, match="steps=2 is too few for 3 blocks.*set steps to at least 3"):
        generate(make_model(), random_prompt(2, 4), steps=2, **knobs)
    assert generate(make_model(), random_prompt(2, 4), steps=3, **knobs).nfe == 3
    fixed = dict.fromkeys(range(4, 8), 5)
    assert generate(make_model(), random_prompt(1, 4), steps=2, fixed=fixed, **knobs).nfe == 2
    tokens = random_prompt(2, 30)
    tokens[0, [3, 9, 29]] = MASK
    with pytest.raises(UserError, match="3 blocks"):
        infill(make_model(), tokens, steps=2, block_length=5)
    assert infill(make_model(), tokens, steps=3, block_length=5).nfe == 3


def test_infill_gives_its_steps_to_the_blocks_with_masks(
    make_model: MakeModel, random_prompt: RandomPrompt
) -> None:
    """90 given tokens and 10 masks: ten steps are ten forwards, wherever the blocks lie."""
    model = make_model(max_length=128)
    tokens = random_prompt(1, 100)
    tokens[0, 55:65] = MASK
    for block_length, expected in ((10, [5, 5]), (20, [5, 5]), (100, [10]), (None, [10])):
        out = infill(model, tokens, steps=10, block_length=block_length)
        assert out.nfe == 10, block_length
        blocks = out.reveal_step[0, 55:65].split(expected)
        assert [len(block.unique()) for block in blocks] == expected
    scattered = random_prompt(1, 100)
    scattered[0, [3, 4, 41, 97, 98, 99]] = MASK
    out = infill(model, scattered, steps=4, block_length=10)  # 3 of 10 blocks: 2, 1 and 1 steps
    assert out.nfe == 4
    assert [len(out.reveal_step[0, a:b].unique()) for a, b in ((3, 5), (41, 42), (97, 100))] == [2, 1, 1]


def test_rows_with_other_gaps_are_filled_as_alone(
    make_model: MakeModel, random_prompt: RandomPrompt, keeping_rule: dict
) -> None:
    model, rows = make_model(5), random_prompt(4, 30)
    for row, gaps in enumerate(([2, 3, 4, 5], [11, 25, 26], [], list(range(7, 29)))):
        rows[row, gaps] = MASK
    together = infill(model, rows, steps=7, block_length=6, temperature=0.5, seed=3, **keeping_rule)
    for row in range(4):
        alone = infill(
            model, rows[row], steps=7, block_length=6, temperature=0.5, seed=[3 + row], **keeping_rule
        )
        assert torch.equal(together.sequences[row], alone.sequences[0])
    assert together.nfe <= 22


def test_signatures_show_the_knobs() -> None:
    names = set(inspect.signature(generate).parameters)
    assert names >= {field.name for field in fields(SamplingConfig)} | {"attention_mask", "seed", "cache"}
    assert inspect.signature(generate).parameters["gen_length"].default == 128
    assert "gen_length" not in inspect.signature(infill).parameters
    with pytest.raises(TypeError, match="stepps"):
        generate(lambda tokens: tokens, torch.zeros(1, 1).long(), mask_id=3, stepps=3)


def test_damaged_attention_ends_the_run(make_model: MakeModel, random_prompt: RandomPrompt) -> None:
    """Torch makes zeros of scores that are no numbers, and the logits are numbers."""
    model = make_model()
    model.layers[1].q_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(FloatingPointError, match=r"layers\.1\.q_proj\.weight holds NaN"):
        generate(model, random_prompt(1, 3), gen_length=4, steps=4)
    with pytest.raises(FloatingPointError, match=r"layers\.1\.q_proj\.weight holds NaN"):
        infill(model, torch.tensor([[3, MASK]]))


def test_padding_on_the_right_is_moved_to_the_left(make_model: MakeModel, keeping_rule: dict) -> None:
    """The tokenizer's own default: a row gets what it gets alone, and `sequences` show where it went."""
    model = make_model(2)
    rows = torch.tensor([[5, 6, 7, 8, 9], [3, 4, 0, 0, 0], [0, 2, 2, 5, 0]])
    attended = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]])
    knobs: dict[str, Any] = {"gen_length": 8, "steps": 8, "block_length": 4, **keeping_rule}
    together = generate(model, rows, attention_mask=attended, seed=[1, 2, 3], **knobs)
    assert together.sequences[:, :5].tolist() == [[5, 6, 7, 8, 9], [0, 0, 0, 3, 4], [0, 0, 2, 2, 5]]
    for row, prompt in enumerate(([5, 6, 7, 8, 9], [3, 4], [2, 2, 5])):
        alone = generate(model, [prompt], seed=[row + 1], **knobs)
        assert together.sequences[row, 5:].tolist() == alone.sequences[0, len(prompt) :].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_with_gaps_is_filled_as_alone(
    make_model: MakeModel, random_prompt: RandomPrompt, keeping_rule: dict, side: str
) -> None:
    model, text = make_model(4), random_prompt(1, 12)[0]
    text[[1, 4, 5, 9, 10]] = MASK
    knobs: dict[str, Any] = {"steps": 5, "block_length": 4, "temperature": 0.5, **keeping_rule}
    alone = infill(model, text, seed=[7], **knobs)
    pads, tokens = torch.zeros(3, dtype=torch.int64), torch.cat([text, random_prompt(1, 3, 5)[0]])
    row = torch.cat([pads, text] if side == "left" else [text, pads])
    attended = torch.stack([(row != 0).long(), torch.ones(15, dtype=torch.int64)])
    padded = infill(model, torch.stack([row, tokens]), attention_mask=attended, seed=[7, 8], **knobs)
    own = padded.sequences[0, 3:] if side == "left" else padded.sequences[0, :12]
    assert own.tolist() == alone.sequences[0].tolist()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 0, 1], [1, 1, 1]], "row 0 has padding between its tokens"),
        ([[1, 1, 1], [0, 2, 1]], "1 on tokens and 0 on padding"),
        ([[0.0, 0.5, 1.0], [1, 1, 1]], "1 on tokens and 0 on padding"),
        ([[1, 1], [1, 1]], r"shape \(2, 2\), the tokens have \(2, 3\)"),
    ],
    ids=str,
)
def test_a_mask_that_is_no_padding_is_refused(
    make_model: MakeModel, random_prompt: RandomPrompt, mask: list, message: str
) -> None:
    for call in (generate, infill):
        with pytest.raises(UserError, match=message):
            call(make_model(), random_prompt(2, 3), attention_mask=torch.tensor(mask), steps=2)


def official_generate(
    model: Transformer, prompt: Tensor, *, gen_length: int, steps: int, block_length: int, logits_eos_inf: bool,
    confidence_eos_eot_inf: bool, eos_id: int, eot_id: int,
) -> Tensor:  # fmt: skip
    """LLaDA's generate.py at temperature 0, spelled out for one row: what its two settings for EOS do, and when."""
    x = torch.cat([prompt, torch.full((1, gen_length), MASK)], dim=1)
    per_block = steps // (gen_length // block_length)
    for start in range(prompt.shape[1], x.shape[1], block_length):
        block = slice(start, start + block_length)
        masks = int((x[0, block] == MASK).sum())
        for step in range(per_block):
            with torch.no_grad():
                logits = model(x)[0].double()
            logits[:, MASK] = -torch.inf
            if logits_eos_inf:
                logits[:, eos_id] = -torch.inf
            best = logits.argmax(-1)
            if confidence_eos_eot_inf:
                logits[:, [eos_id, eot_id]] = -torch.inf
            confidence = logits.softmax(-1).gather(-1, best[:, None])[:, 0]
            confidence[(x[0] != MASK) | (torch.arange(x.shape[1]) >= block.stop)] = -torch.inf
            count = masks // per_block + (step < masks % per_block)
            chosen = confidence.sort(descending=True, stable=True).indices[:count]
            x[0, chosen] = best[chosen]
    return x


@pytest.mark.parametrize("settings", [(True, False), (False, True), (True, True)], ids=str)
def test_lladas_settings_for_eos_are_its_own(
    make_model: MakeModel, random_prompt: RandomPrompt, settings: tuple[bool, bool]
) -> None:
    names = dict(zip(("logits_eos_inf", "confidence_eos_eot_inf"), settings, strict=True))
    changed = 0
    for seed in range(4):
        model = make_model(seed)
        with torch.no_grad():
            for end in (EOS, 7):  # so that the ends would often be the best guess
                model.lm_head.weight[end] = model.lm_head.weight[MASK]
        prompt = random_prompt(1, 5, seed)
        shape = {"gen_length": 12, "steps": 12, "block_length": 6}
        expected = official_generate(model, prompt, **shape, **names, eos_id=EOS, eot_id=7)
        out = generate(model, prompt, **shape, **names, eot_id=7)
        assert torch.equal(out.sequences, expected)
        if settings[0]:
            assert not (out.sequences[0, 5:] == EOS).any()
        changed += not torch.equal(out.sequences, generate(model, prompt, **shape).sequences)
    assert changed


def test_ends_of_no_confidence_come_last_at_any_temperature() -> None:
    def predict(tokens: Tensor, **_: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 6)
        logits[:, 1::2, EOS] = 12.0
        logits[:, ::2, 4] = 9.0
        return logits

    for temperature in (0.0, 0.2):
        knobs: dict[str, Any] = {
            "gen_length": 6,
            "steps": 6,
            "mask_id": 5,
            "temperature": temperature,
            "seed": 0,
        }
        plain = generate(predict, [[3, 3]], **knobs).reveal_step[0]
        late = generate(predict, [[3, 3]], eos_id=EOS, confidence_eos_eot_inf=True, **knobs)
        assert plain[1::2].max() < plain[::2].min()
        assert late.reveal_step[0, 0] == 0
        fixed = generate(predict, [[3, 3]], confidence_eos_eot_inf=True, eos_id=0, eot_id=EOS, **knobs)
        assert fixed.reveal_step[0, ::2].max() < fixed.reveal_step[0, 1::2].min()
    with pytest.raises(UserError, match="confidence_eos_eot_inf needs the id of EOS"):
        generate(predict, [[3]], mask_id=5, confidence_eos_eot_inf=True)


def test_fixed_tokens_stand_where_they_were_put(make_model: MakeModel, any_rule: dict) -> None:
    model = make_model(1)
    knobs: dict[str, Any] = {"gen_length": 9, "block_length": 3, "seed": 4, **any_rule}
    out = generate(model, [[5, 6], [7]], fixed={2: 11, 6: 12, 7: 13}, steps=None, eos_id=EOS, **knobs)
    assert (out.sequences[:, [4, 8, 9]] == torch.tensor([11, 12, 13])).all()
    assert (out.reveal_step[:, [2, 6, 7]] == -1).all()
    assert not (out.sequences[:, 2:9] == EOS).any()  # no end before the last of them
    assert out.nfe <= 6  # they are no masks
    # Given tokens of the row: the same as infilling around them.
    row = torch.tensor([[5, 6] + [MASK] * 9])
    row[0, [4, 8, 9]] = torch.tensor([11, 12, 13])
    around = generate(model, [[5, 6]], fixed={2: 11, 6: 12, 7: 13}, steps=6, **{**knobs, "block_length": 20})
    gaps = infill(model, row, steps=6, seed=4, **any_rule)
    if not any_rule:
        assert torch.equal(around.sequences, gaps.sequences)
    with pytest.raises(UserError, match="fixed puts the text ' cat' at position 0"):
        generate(model, [[5]], fixed={0: " cat"}, **knobs)
    with pytest.raises(UserError, match="mask token 22 at position 1"):
        generate(model, [[5]], fixed={1: MASK}, **knobs)
    with pytest.raises(UserError, match="write the tokens into tokens_with_masks"):
        infill(model, row, fixed={1: 3}, **any_rule)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: generate(model, torch.tensor([[1, 23]]), gen_length=2), "generate: the token id 23 lies outside"),
        (lambda model: generate(model, torch.tensor([[-1]]), gen_length=2), "the token id -1"),
        (lambda model: generate(model, [[3]], gen_length=2, fixed={1: 99}), "the token id 99"),
        (lambda model: generate(model, [[3]], gen_length=2, eos_id=77), "the token id 77"),
        (lambda model: generate(model, [[3]], gen_length=2, mask_id=50), "the token id 50"),
        (lambda model: infill(model, torch.tensor([[22, 40]])), "infill: the token id 40"),
        (lambda model: generate(model, torch.rand(1, 3), gen_length=2), "token ids are integers"),
        (lambda model: generate(model, [1, 2], gen_length=2), "prompts are lists of token ids"),
        (lambda model: generate(model, [[1.5]], gen_length=2), "prompts are lists of token ids"),
        (lambda model: generate(model, "text", gen_length=2), "prompts are lists of token ids"),
        (lambda model: generate(model, [[3]], gen_length=2, seed=1.5), "a seed is an integer"),
        (lambda model: generate(model, [[3]], gen_length=2, seed="x"), "a seed is an integer"),
        (lambda model: infill(model, [[3]]), "tokens_with_masks is a tensor"),
    ],
)  # fmt: skip
def test_what_the_network_has_no_row_for_is_refused(
    make_model: MakeModel, call: Callable, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        call(make_model())
