"""Canvases that grow: the tokens, forwards and lengths of a loop written from the definition, in any company, and an end to it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llada.errors import UserError
from llada.model.transformer import Transformer
from llada.sampling.canvas import Canvas, prompt_canvas
from llada.sampling.config import SamplingConfig
from llada.sampling.forward import forward
from llada.sampling.generate import generate, infill
from llada.sampling.sampler import commit, denoise, plan

MakeModel = Callable[..., Transformer]
MASK, EOS, EOT = 22, 1, 2
CACHES: list[dict[str, Any]] = [
    {"cache": "prefix"},
    {"cache": "dual"},
    {"cache": "vicinity", "vicinity": 2},
    {"cache": "interval", "prompt_interval": 4, "response_interval": 3},
    {"shared_depth": 0.5},
]
RULES: list[dict[str, Any]] = [
    {},
    {"remasking": "random"},
    {"remasking": "margin"},
    {"threshold": 0.3},
    {"entropy_bound": 1.0},
]
STEPPING: list[dict[str, Any]] = [{"remasking": "ancestral"}, {"remdm_cap": 0.3}, {"p2_eta": 1.0}]


def eager(model: Transformer, scale: float, sharpness: float = 1.0) -> Transformer:
    """The network, which likes to end a text so much more, and is so much surer of what it writes."""
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
        model.lm_head.weight[EOS].mul_(scale)
        model.lm_head.weight[EOT].mul_(scale)
    return model


def by_definition(model: Transformer, prompt: list[int], config: SamplingConfig) -> tuple[list[int], int]:
    """The text of a greedy row, as long as its canvas became, and its forwards. Steps are one for each mask."""
    assert config.initial_length is not None
    most, size, added = config.gen_length, config.block_length, config.expansion_length
    text = [MASK] * min(config.initial_length, most)
    is_appending, has_ended, nfe = len(text) < most, False, 0
    while MASK in text:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + text]))[0, len(prompt) :].double()
        if config.cfg_scale:
            with torch.no_grad():
                other = model(torch.tensor([[MASK] * len(prompt) + text]))[0, len(prompt) :].double()
            logits = other + (config.cfg_scale + 1) * (logits - other)
        nfe += 1
        logits[:, MASK] = -torch.inf
        probs, best = logits.softmax(1).max(1)
        masks = [i for i, token in enumerate(text) if token == MASK]
        last = masks[-config.eos_window :]
        certainty = sum(float(probs[i]) for i in last if int(best[i]) in (EOS, EOT)) / len(last)
        if is_appending and certainty < config.eos_threshold:
            text += [MASK] * min(added, most - len(text))
            is_appending = len(text) < most
            continue
        is_appending = False
        block = [i for i in masks if i // size == masks[0] // size]
        surest = first_highest(block, probs)
        chosen = [surest]
        if config.threshold is not None:
            chosen = [i for i in block if probs[i] >= config.threshold] or [surest]
        for i in chosen:
            text[i] = int(best[i])
            if text[i] in (EOS, EOT):
                has_ended = True
                text = text[: i + 1]
                break
        doubtful = [
            i for i in block if i < len(text) and text[i] == MASK and probs[i] < (config.insert_below or 0)
        ]
        if doubtful and not has_ended and certainty < config.insert_eos_threshold:
            least = first_highest(doubtful, -probs)
            text[least : least + 1] = [MASK] * min(added, 1 + most - len(text))
    return text, nfe


def first_highest(places: list[int], values: Tensor) -> int:
    """The first of those that are the highest but for rounding."""
    best = max(float(values[i]) for i in places)
    return next(i for i in places if float(values[i]) > best - 1e-6)


def random_case(seed: int) -> tuple[list[int], SamplingConfig]:
    rng = random.Random(seed)
    config = SamplingConfig(
        gen_length=rng.randint(1, 20),
        initial_length=rng.randint(1, 12),
        expansion_length=rng.randint(2, 6),
        eos_window=rng.choice([1, 2, 4, 32]),
        eos_threshold=rng.choice([0.0, 0.0, 0.1, 0.5]),
        insert_below=rng.choice([None, 0.3, 0.5, 0.8]),
        block_length=rng.randint(1, 9),
        threshold=rng.choice([None, 0.4]),
        cfg_scale=rng.choice([0.0, 0.0, 1.0]),
    )
    return [rng.randrange(3, MASK) for _ in range(rng.randint(0, 6))], config


def test_rows_grow_as_the_definition_says(make_model: MakeModel) -> None:
    lengths, insertions, looks, ended = set(), 0, 0, 0
    for scale, sharpness in ((2.0, 1.0), (1.0, 0.4), (3.0, 0.4)):
        model = eager(make_model(4), scale, sharpness)
        for seed in range(50):
            prompt, config = random_case(seed)
            text, nfe = by_definition(model, prompt, config)
            canvas = prompt_canvas([prompt], config, mask_id=MASK, eos_id=[EOS, EOT], seed=[0])
            stop = int(canvas.stop[0])
            for _ in denoise(model, canvas):
                if (width := int(canvas.stop[0])) > stop:
                    has_written = bool((canvas.reveal_step == canvas.forwards[0] - 1).any())
                    insertions, looks = insertions + has_written, looks + (not has_written)
                stop = width
                assert stop <= canvas.limit[0] == len(prompt) + config.gen_length
            written = canvas.tokens[0, len(prompt) :].tolist()
            assert written[: len(text)] == text, (scale, seed)
            assert written[len(text) :] == [EOS] * (config.gen_length - len(text)), (scale, seed)
            assert (int(canvas.stop[0]) - len(prompt), canvas.nfe) == (len(text), nfe), (scale, seed)
            lengths.add(len(text) / config.gen_length)
            ended += text[-1] in (EOS, EOT)
    # The cases hold some of each: none that grew, all the way, and between; ends, and canvases that were filled without.
    assert min(looks, insertions, ended, 150 - ended) > 20
    assert 1.0 in lengths
    assert len(lengths) > 10


def walk(model: Any, canvas: Canvas) -> int:
    """To the end, with what holds at every forward; how often masks were put between what was written."""
    insertions, columns = 0, torch.arange(canvas.tokens.shape[1])
    while (step := plan(canvas)) is not None:
        before, stop, forwards = canvas.tokens.clone(), canvas.stop.clone(), canvas.forwards.clone()
        again = plan(canvas)
        assert again is not None
        assert torch.equal(step.where, again.where)  # planning changes nothing
        commit(canvas, step, forward(model, canvas, step))
        for row in range(len(canvas)):
            if canvas.stop[row] >= stop[row] and not canvas.rules[row].may_remask:
                # What was committed stays, in its order: only masks, and what they become, come in between.
                now = iter(canvas.tokens[row, : canvas.stop[row]].tolist())
                assert all(token == MASK or token in now for token in before[row, : stop[row]].tolist())
            if canvas.stop[row] > stop[row]:
                assert MASK in canvas.tokens[row, : canvas.stop[row]]
                insertions += bool((canvas.reveal_step[row] == forwards[row]).any())
        assert (canvas.stop <= canvas.limit).all()
        is_written = (canvas.tokens != MASK) & ~canvas.prompt
        is_fed = columns < canvas.stop[:, None]
        assert torch.equal((canvas.reveal_step >= 0) & is_fed, is_written & is_fed)
    assert not (canvas.tokens == MASK).any()
    return insertions


def settings(rng: random.Random) -> dict[str, Any]:
    rule = rng.choice([*RULES, *STEPPING])
    inserts = rule not in STEPPING and rng.random() < 0.6
    return {
        "gen_length": 17,
        "block_length": rng.randint(1, 9),
        "steps": None if inserts else rng.choice([None, 17, 21]),
        "initial_length": rng.randint(1, 6),
        "expansion_length": rng.randint(2, 5),
        "eos_window": rng.choice([1, 4]),
        "eos_threshold": rng.choice([0.0, 0.3]),
        "insert_below": rng.choice([0.3, 0.6]) if inserts else None,
        "temperature": rng.choice([None, 0.7]),
        "cfg_scale": rng.choice([0.0, 1.0]),
        **rule,
        **rng.choice([{}, *CACHES]),
    }


@pytest.mark.parametrize(("scale", "sharpness"), [(2.0, 1.0), (1.0, 0.4)])
def test_a_batch_equals_its_rows_alone(make_model: MakeModel, scale: float, sharpness: float) -> None:
    model, rng = eager(make_model(2), scale, sharpness), random.Random(0)
    prompts = [[5, 6, 7, 8, 9], [3], [], [17, 2, 2, 5]]
    seeds = [10, 77, 3, 2**31 + 1]
    different = insertions = 0
    for _ in range(20):
        knobs = settings(rng)
        canvases = [
            prompt_canvas(rows, SamplingConfig(**knobs), mask_id=MASK, eos_id=EOS, seed=seed)
            for rows, seed in [
                (prompts, seeds),
                *zip([[p] for p in prompts], [[s] for s in seeds], strict=True),
            ]
        ]
        insertions += sum([walk(model, canvas) for canvas in canvases])
        together, *alone = canvases
        assert together.nfe == max(one.nfe for one in alone)
        for row, one in enumerate(alone):
            assert together.tokens[row, -17:].tolist() == one.tokens[0, -17:].tolist(), knobs
            assert together.forwards[row] == one.forwards[0]
            assert together.token_forwards[row] == one.token_forwards[0]
        different += len({int(one.forwards[0]) for one in alone}) > 1
    assert different > 7
    assert insertions > 20 * (sharpness < 1)


def test_steps_bound_the_decoding_and_not_the_search_for_the_length(make_model: MakeModel) -> None:
    model = make_model(1)
    for steps in (5, 7, 30):
        canvas = prompt_canvas(
            [[3, 4]],
            SamplingConfig(gen_length=17, block_length=4, initial_length=2, expansion_length=5, steps=steps),
            mask_id=MASK,
            eos_id=EOS,
        )
        looks, width = 0, int(canvas.stop[0])
        for _ in denoise(model, canvas):
            looks += int(canvas.stop[0]) > width
            width = int(canvas.stop[0])
        assert looks == 3
        assert canvas.nfe - looks <= max(steps, 5)


def function(end: Callable[[int], float]) -> Callable[..., Tensor]:
    """A network of 23 ids that takes EOS for likely at a column as `end` says, and any other token for equally likely; it
    would most like to write the mask."""

    def predict(tokens: Tensor, **_: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 23)
        for column in range(tokens.shape[1]):
            logits[:, column, EOS] = end(column)
        logits[..., MASK] = 50.0
        return logits

    return predict


@pytest.mark.parametrize("rule", [*RULES, {"threshold": 0.0}], ids=str)
@pytest.mark.parametrize("block_length", [1, 3, 64])
def test_a_network_that_never_ends_fills_the_canvas(rule: dict[str, Any], block_length: int) -> None:
    """No mask is ever anything but doubtful: the canvas grows to `gen_length` and no further, each mask by one forward at most."""
    never = function(lambda column: -50.0)
    knobs = {
        "gen_length": 11,
        "initial_length": 2,
        "expansion_length": 4,
        "block_length": block_length,
        **rule,
    }
    out = generate(never, [[5, 6]], mask_id=MASK, eos_id=EOS, insert_below=1.0, **knobs)
    assert not torch.isin(out.sequences, torch.tensor([MASK, EOS])).any()
    assert 4 <= out.nfe <= 3 + 11  # 2, 6, 10, 11 masks: three forwards lengthen
    # Never appended to, but only put in: where a canvas of two is enough, the midst grows.
    inside = generate(never, [[5, 6]], mask_id=MASK, eos_id=EOS, insert_below=1.0, eos_threshold=0.0, **knobs)
    assert not (inside.sequences == MASK).any()
    grows = rule != {"threshold": 0.0} and block_length > 1
    assert (inside.sequences[0] != EOS).sum() == 2 + (11 if grows else 2)
    assert inside.nfe <= 11


def test_a_network_that_always_ends_stays_short() -> None:
    always = function(lambda column: 50.0)
    out = generate(
        always, [[5, 6]], gen_length=30, initial_length=4, mask_id=MASK, eos_id=EOS, insert_below=1.0
    )
    assert out.sequences.tolist() == [[5, 6] + [EOS] * 30]
    assert (out.nfe, out.token_forwards) == (1, 6)  # of what is given to the function
    assert out.reveal_step.tolist() == [[0] + [-1] * 29]


def test_what_is_put_in_has_forwards_of_its_own() -> None:
    """Two masks, of which the right one is written and the left one becomes two, until there are eight: what was written fills
    the blocks behind, which then ask for no step any more."""

    def predict(tokens: Tensor, **_: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 23)
        logits[..., 5] = torch.arange(tokens.shape[1]) * 0.1
        return logits

    config = SamplingConfig(
        gen_length=8,
        initial_length=2,
        eos_threshold=0.0,
        expansion_length=2,
        insert_below=1.0,
        block_length=2,
    )
    canvas = prompt_canvas([[6]], config, mask_id=MASK, eos_id=EOS)
    drawn = ["".join(".x"[int(t)] for t in (state.tokens[0] != MASK)) for state in denoise(predict, canvas)]
    # x is written; behind the canvas stands EOS.
    assert drawn == ["x..xxxxxx"] * 6 + ["x.xxxxxxx", "xxxxxxxxx"]
    assert (canvas.tokens[0, 1:] != EOS).all()
    assert canvas.reveal_step[0].tolist() == [-1, 7, 6, 5, 4, 3, 2, 1, 0]


def test_once_the_end_is_written_the_length_is_settled() -> None:
    """All masks are doubtful and the end is not certain, but it is what is written first."""
    network = function(lambda column: 3.0 if column == 5 else -50.0)
    config = SamplingConfig(gen_length=20, initial_length=8, eos_threshold=0.0, insert_below=1.0)
    canvas = prompt_canvas([[5, 6]], config, mask_id=MASK, eos_id=EOS)
    assert [int(state.stop[0]) for state in denoise(network, canvas)] == [6] * 4
    assert canvas.tokens[0, 5:].tolist() == [EOS] * 17


def test_the_canvas_is_as_long_as_the_text_and_its_window() -> None:
    """EOS from column 9 on: 3, 6, 9, … masks, until most of the last four masks are ends."""
    network = function(lambda column: 50.0 if column >= 9 else -50.0)
    knobs = {"gen_length": 40, "initial_length": 3, "expansion_length": 3, "eos_window": 4, "block_length": 5}
    lengths = {}
    for threshold in (0.1, 0.5, 0.9):
        canvas = prompt_canvas(
            [[5, 6]], SamplingConfig(eos_threshold=threshold, **knobs), mask_id=MASK, eos_id=EOS
        )
        width = []
        for _ in denoise(network, canvas):
            width.append(int(canvas.stop[0]) - 2)
        lengths[threshold] = max(width)
        assert canvas.stop[0] == 10
        assert canvas.tokens[0, 9:].tolist() == [EOS] * 33
        assert canvas.nfe == max(width) // 3 - 1 + 8
    assert lengths == {0.1: 9, 0.5: 9, 0.9: 12}
    # Fewer masks than the window: the mean is of those there are.
    short = generate(network, [[5] * 9], mask_id=MASK, eos_id=EOS, **{**knobs, "eos_window": 32})
    assert short.nfe == 1


@torch.no_grad()
@pytest.mark.parametrize("mode", [*CACHES[:-1], {}], ids=str)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_a_canvas_that_has_grown_is_fed_as_a_whole(
    make_model: MakeModel, mode: dict[str, Any], cfg_scale: float
) -> None:
    """The forward behind an insertion gets the logits of the network without a cache: no key or value is of another place."""
    model, grown = make_model(0), 0
    config = SamplingConfig(
        gen_length=24, initial_length=8, eos_threshold=0.0, expansion_length=4, insert_below=0.99, cfg_scale=cfg_scale,
        block_length=6, **mode,
    )  # fmt: skip
    canvas = prompt_canvas([[3, 4, 5]], config, mask_id=MASK, eos_id=EOS)
    has_grown = True
    while (step := plan(canvas)) is not None:
        stop = int(canvas.stop[0])
        logits = forward(model, canvas, step)
        if has_grown:
            expected = model(canvas.tokens[:, :stop], logits_at=step.where[:, :stop])
            if cfg_scale:
                hidden = canvas.tokens[:, :stop].masked_fill(canvas.prompt[:, :stop], MASK)
                other = model(hidden, logits_at=step.where[:, :stop])
                expected = other + (cfg_scale + 1) * (expected - other)
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
            grown += 1
        commit(canvas, step, logits)
        has_grown = int(canvas.stop[0]) > stop
    assert grown > 2
    assert not (canvas.tokens == MASK).any()


@pytest.mark.parametrize("mode", ["prefix", "dual", "vicinity"])
def test_with_everything_fed_a_cache_is_none(make_model: MakeModel, mode: str) -> None:
    model = make_model(4)
    knobs = {"gen_length": 19, "initial_length": 2, "block_length": 4, "eos_threshold": 0.3, "threshold": 0.4}
    for prompt in ([], [3, 4, 5], [9, 8]):
        config = SamplingConfig(expansion_length=3, eos_window=3, **knobs)
        cached = SamplingConfig(expansion_length=3, eos_window=3, cache=mode, refresh_every=1, **knobs)
        one, two = (prompt_canvas([prompt], c, mask_id=MASK, eos_id=EOS) for c in (config, cached))
        walk(model, one)
        walk(model, two)
        assert torch.equal(one.tokens, two.tokens)
        assert torch.equal(one.token_forwards, two.token_forwards)


def test_a_step_that_failed_changes_nothing(make_model: MakeModel) -> None:
    """One row must be lengthened, the other one's logits are no numbers: both are as they were."""
    model = make_model(2)
    grows = SamplingConfig(gen_length=9, initial_length=2, expansion_length=3)
    canvas = Canvas.join(
        [
            prompt_canvas([[3]], config, mask_id=MASK, eos_id=EOS, seed=[0])
            for config in (grows, SamplingConfig(gen_length=4))
        ]
    )
    step = plan(canvas)
    assert step is not None
    before = canvas.tokens.clone()
    logits = forward(model, canvas, step)
    for place in (-1, 1):  # the other row's; what is only looked at
        broken = logits.clone()
        broken[place] = torch.nan
        with pytest.raises(FloatingPointError):
            commit(canvas, step, broken)
        assert torch.equal(canvas.tokens, before)
        assert canvas.stop.tolist() == [3, 5]
        assert canvas.forwards.tolist() == [0, 0]
    commit(canvas, step, logits)
    assert canvas.stop.tolist() == [6, 5]
    assert canvas.forwards.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"fixed": {0: 3}}, "fixed={0: 3} means nothing where the canvas grows"),
        ({"allowed": {2: (3,)}}, "allowed names a position"),
        ({"forbidden": {2: (3,)}}, "forbidden names a position"),
        ({"suffix_window": 3}, "suffix_window=3 means nothing where the canvas grows"),
        ({"logits_eos_inf": True}, "logits_eos_inf=True means nothing where the canvas grows"),
        ({"insert_eos_threshold": 0.5}, "insert_eos_threshold=0.5 means nothing without insert_below"),
        ({"insert_below": 0.1, "steps": 4}, "steps=4 cannot be shared out"),
        *(
            ({"insert_below": 0.1, **rule}, "insert_below=0.1 needs a rule that chooses among the masks")
            for rule in STEPPING
        ),
    ],
    ids=str,
)
def test_what_does_not_go_with_growing_is_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingConfig(gen_length=8, initial_length=2, **knobs)


def test_where_a_canvas_cannot_grow_it_is_said(make_model: MakeModel) -> None:
    config = SamplingConfig(gen_length=8, initial_length=2, block_length=4)
    with pytest.raises(UserError, match="initial_length=2 needs the id of EOS"):
        prompt_canvas([[3]], config, mask_id=MASK)
    with pytest.raises(UserError, match="something given stands behind"):
        prompt_canvas([[3]], config, mask_id=MASK, eos_id=EOS, suffix=[4])
    with pytest.raises(UserError, match="initial_length=2 means nothing to a block-causal network"):
        prompt_canvas([[3]], config, mask_id=MASK, eos_id=EOS, network_block=4)
    with pytest.raises(UserError, match="infill: initial_length=2 means nothing here"):
        infill(make_model(0), torch.tensor([[3, MASK]]), initial_length=2)
    # A mask in the prompt is no part of the text: filled with the first block, and never the place of several.
    out = generate(
        make_model(0), [[3, MASK, 4]], gen_length=8, initial_length=3, insert_below=1.0, eos_id=EOS
    )
    assert out.sequences[0, [0, 2]].tolist() == [3, 4]
    assert not (out.sequences == MASK).any()
