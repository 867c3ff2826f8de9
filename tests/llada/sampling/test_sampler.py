"""The denoising loop: what must hold at every step, whatever the model and the knobs."""

import dataclasses
import itertools
import sys
from collections.abc import Callable
from dataclasses import asdict
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llada.diffusion.schedule import get_schedule
from llada.model.transformer import Transformer
from llada.sampling.canvas import Canvas, prompt_canvas
from llada.sampling.config import SamplingConfig
from llada.sampling.draw import draw_tokens
from llada.sampling.forward import forward
from llada.sampling.generate import generate, infill
from llada.sampling.rules import Rule, find_rule
from llada.sampling.sampler import commit, denoise, plan

MakeModel = Callable[..., Transformer]
RandomPrompt = Callable[..., Tensor]
MASK, EOS = 22, 1
PARALLEL: list[dict[str, Any]] = [{"threshold": 0.4}, {"factor": 1.0}, {"entropy_bound": 1.0}]

knobs = st.fixed_dictionaries(
    {
        "gen_length": st.integers(1, 12),
        "steps": st.integers(1, 14),
        "block_length": st.integers(1, 14),
        "temperature": st.sampled_from([0.0, 0.0, 0.7, 1.5]),
        "cfg_scale": st.sampled_from([0.0, 0.0, 1.0]),
    }
)


@given(
    knobs=knobs,
    shape=st.tuples(st.integers(1, 3), st.integers(0, 5)),
    eos=st.booleans(),
    seed=st.integers(0, 5),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_invariants_hold_at_every_step(
    make_model: MakeModel,
    random_prompt: RandomPrompt,
    any_rule: dict,
    knobs: dict,
    shape: tuple[int, int],
    eos: bool,
    seed: int,
) -> None:
    blocks = -(-knobs["gen_length"] // knobs["block_length"])
    config = SamplingConfig(**{**knobs, **any_rule, "steps": max(knobs["steps"], blocks)})
    may_remask = find_rule(config).may_remask
    prompt = random_prompt(*shape, seed)
    canvas = prompt_canvas(prompt, config, mask_id=MASK, seed=seed, eos_id=EOS if eos else None)
    P, L = shape[1], shape[1] + config.gen_length
    before, reveal_before, forwards = canvas.tokens.clone(), canvas.reveal_step.clone(), 0
    for state in denoise(make_model(seed), canvas):
        forwards += 1
        assert state is canvas
        assert canvas.nfe == forwards
        settled = before != MASK
        if may_remask:
            # But for what has become a mask again: nothing given, no end, nothing in a block that is done.
            dropped = settled & (canvas.tokens == MASK)
            assert not (dropped & (canvas.prompt | (before == EOS) if eos else canvas.prompt)).any()
            assert (canvas.block_of[dropped] == canvas.block[:, None].expand_as(before)[dropped]).all()
            assert (canvas.reveal_step[dropped] == -1).all()
            settled &= ~dropped
            before[dropped] = MASK
        assert torch.equal(canvas.tokens[settled], before[settled])  # what is committed stays
        assert torch.equal(canvas.reveal_step[settled], reveal_before[settled])
        committed = canvas.reveal_step == forwards - 1
        # No forward in vain, but where what it wrote becomes a mask again before the next one.
        assert committed.any() or may_remask
        assert (before[committed] == MASK).all()
        changed = (canvas.tokens != before) & ~committed
        assert eos or not changed.any()
        assert (canvas.tokens[changed] == EOS).all()  # only the filling behind an EOS
        # Blocks left to right: nothing is committed while a mask is left in an earlier block.
        if committed.any():
            for row in range(shape[0]):
                where = committed[row].nonzero().flatten()
                if len(where):
                    block_start = P + (int(where.min()) - P) // config.block_length * config.block_length
                    assert not (canvas.tokens[row, :block_start] == MASK).any()
                    assert int(where.max()) < block_start + config.block_length
        before, reveal_before = canvas.tokens.clone(), canvas.reveal_step.clone()
    assert not (canvas.tokens == MASK).any()
    assert torch.equal(canvas.tokens[:, :P], prompt)
    assert (canvas.reveal_step[:, :P] == -1).all()
    assert config.steps is not None
    assert forwards <= config.steps
    assert forwards <= config.gen_length * shape[0] or "remasking" in any_rule or may_remask
    for row in range(shape[0]):
        generated, revealed = canvas.tokens[row, P:L], canvas.reveal_step[row, P:L]
        if eos and (generated == EOS).any():
            first = int((generated == EOS).nonzero()[0])
            assert (generated[first + 1 :] == EOS).all()
            assert (revealed[first + 1 :] == -1).all()
            assert (revealed[: first + 1] >= 0).all()
        else:
            assert (revealed >= 0).all()


def test_nothing_is_committed_after_the_first_eos() -> None:
    """A model that is surest of EOS in the middle: the tail is filled, never denoised, and costs no forward."""

    def predict(tokens: Tensor, **_: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 6)
        length = tokens.shape[1]
        logits[:, torch.arange(length), torch.arange(length) % 3 + 2] = 5 + torch.arange(length) * 0.1
        logits[:, 3, EOS] = 20
        return logits

    prompt = torch.tensor([[4, 3]])
    out = generate(predict, prompt, gen_length=8, steps=8, block_length=4, mask_id=5, eos_id=EOS)
    assert out.sequences.tolist() == [[4, 3, 4, 1, 1, 1, 1, 1, 1, 1]]
    assert out.reveal_step.tolist() == [[1, 0, -1, -1, -1, -1, -1, -1]]
    assert out.nfe == 2
    fixed = generate(predict, prompt, gen_length=8, steps=8, block_length=4, mask_id=5)
    assert fixed.nfe == 8
    assert (fixed.reveal_step >= 0).all()
    # Within one step: several are committed at once, those behind the EOS are not.
    once = generate(predict, prompt, gen_length=8, steps=1, block_length=8, mask_id=5, eos_id=EOS)
    assert once.reveal_step.tolist() == [[0, 0, -1, -1, -1, -1, -1, -1]]


@pytest.mark.parametrize(
    ("temperature", "drawing"),
    [(0.0, {}), (1.0, {}), (1.0, {"stratified": True, "top_p": 0.8, "top_k": 9, "min_p": 0.02})],
    ids=["greedy", "drawn", "cut"],
)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_a_batch_equals_its_rows_alone(
    make_model: MakeModel, any_rule: dict, temperature: float, drawing: dict, cfg_scale: float
) -> None:
    model = make_model(2)
    # On the canvas of the empty prompt, nothing but masks, all positions are equal but for rounding.
    prompts = [[5, 6, 7, 8, 9], [3], [], [17, 2, 2, 5]]
    seeds = [10, 77, 3, 2**31 + 1]
    settings: dict = {
        "gen_length": 9,
        "steps": 6,
        "block_length": 5,
        "temperature": temperature,
        "cfg_scale": cfg_scale,
        "eos_id": EOS,
        **any_rule,
        **drawing,
    }
    together = generate(model, prompts, seed=seeds, **settings)
    texts = []
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = generate(model, [prompt], seed=[seed], **settings)
        assert together.sequences[row, -9:].tolist() == alone.sequences[0, -9:].tolist()
        committed = together.reveal_step[row] >= 0
        assert torch.equal(committed, alone.reveal_step[0] >= 0)
        texts.append(alone.sequences[0, -9:].tolist())
    assert len({tuple(text) for text in texts}) > 1


@pytest.mark.parametrize("rule", PARALLEL, ids=str)
def test_parallel_rules_commit_what_their_definition_says(
    make_model: MakeModel, random_prompt: RandomPrompt, rule: dict
) -> None:
    """Replay a run: at every forward, the rule applied to the model's own confidences of the block's masks."""
    model, prompt, P = make_model(2), random_prompt(1, 4), 4
    config = SamplingConfig(gen_length=12, steps=None, block_length=6, **rule)
    canvas = prompt_canvas(prompt, config, mask_id=MASK, seed=0)
    before, sizes = canvas.tokens.clone(), []
    for _ in denoise(model, canvas):
        masks = (before[0] == MASK).nonzero().flatten()
        block_end = P + ((int(masks[0]) - P) // 6 + 1) * 6
        masks = masks[masks < block_end]
        with torch.no_grad():
            logits = model(before)[0, masks].double()
        logits[:, MASK] = -torch.inf
        p, best = logits.softmax(-1).max(-1)
        if "threshold" in rule:
            chosen = {i for i in range(len(p)) if p[i] >= 0.4} or {int(p.argmax())}
        elif "factor" in rule:
            order = p.argsort(descending=True).tolist()
            n = 1
            while n < len(order) and p[order[n]] >= 1 - 1 / (n + 2):
                n += 1
            chosen = set(order[:n])
        else:
            entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
            order = entropy.argsort().tolist()
            chosen = {order[k] for k in range(len(order)) if k == 0 or entropy[order[:k]].sum() <= 1.0}
        committed = (canvas.reveal_step[0] == canvas.nfe - 1).nonzero().flatten()
        expected = masks[sorted(chosen)]
        assert torch.equal(committed, expected)
        assert torch.equal(canvas.tokens[0, committed], best[sorted(chosen)])
        sizes.append(len(committed))
        before = canvas.tokens.clone()
    assert sum(sizes) == 12
    assert max(sizes) > 1  # the rule was put to use
    assert min(sizes) >= 1


def test_low_confidence_ignores_the_temperature() -> None:
    """Confidence is the un-noised probability of the drawn token; random remasking ignores it altogether."""

    def predict(tokens: Tensor, **_: Tensor) -> Tensor:
        logits = torch.full((*tokens.shape, 4), -30.0)
        logits[..., 1] = 10.0
        logits[..., 0] = torch.arange(tokens.shape[1]) * 0.3 - 1.0  # the later, the less certain
        return logits

    empty = torch.empty(1, 0).long()
    out = generate(predict, empty, gen_length=6, steps=6, block_length=6, temperature=0.3, mask_id=3, seed=0)
    assert out.reveal_step.tolist() == [[0, 1, 2, 3, 4, 5]]
    orders = {
        tuple(
            generate(
                predict, empty, gen_length=6, steps=6, block_length=6, remasking="random", mask_id=3, seed=s
            )
            .reveal_step[0]
            .tolist()
        )
        for s in range(6)
    }
    assert len(orders) > 4


@pytest.mark.parametrize(
    ("gen_length", "steps", "block_length", "expected"),
    [
        (10, 10, 4, [4, 3, 3]),  # the last block is short: 2 masks in 2 of its 3 steps
        (8, 5, 4, [3, 2]),
        (6, 3, 2, [1, 1, 1]),  # a step for each block
        (5, 50, 5, [5]),  # more steps than masks: no forward in vain
    ],
)
def test_forwards_per_block(
    make_model: MakeModel,
    random_prompt: RandomPrompt,
    gen_length: int,
    steps: int,
    block_length: int,
    expected: list[int],
) -> None:
    out = generate(
        make_model(), random_prompt(1, 3), gen_length=gen_length, steps=steps, block_length=block_length
    )
    per_block = [len(block.unique()) for block in out.reveal_step[0].split(block_length)]
    blocks = [min(block_length, gen_length - start) for start in range(0, gen_length, block_length)]
    assert per_block == [min(n, size) for n, size in zip(expected, blocks, strict=True)]
    assert out.nfe == sum(per_block)
    for n, block in zip(per_block, out.reveal_step[0].split(block_length), strict=True):
        counts = torch.bincount(block - block.min()).tolist()
        assert counts == [len(block) // n + (step < len(block) % n) for step in range(n)]


class ToyLanguage:
    """Three positions, three words (the mask is 3), and the true conditionals as a "network"."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.joint = torch.rand(3, 3, 3, generator=generator, dtype=torch.float64) ** 3 + 0.01
        self.joint /= self.joint.sum()

    def conditional(self, canvas: tuple[int, ...], position: int) -> Tensor:
        index = tuple(slice(None) if token == 3 else slice(token, token + 1) for token in canvas)
        kept = [axis for axis in range(3) if axis != position]
        marginal = self.joint[index].sum(dim=kept)
        if canvas[position] != 3:
            return torch.ones(3, dtype=torch.float64)
        return marginal / marginal.sum()

    def network(self) -> Callable[..., Tensor]:
        table = torch.full((4, 4, 4, 3, 4), 3.0, dtype=torch.float64)  # the mask's logit must not matter
        for canvas in itertools.product(range(4), repeat=3):
            for position in range(3):
                table[canvas][position, :3] = self.conditional(canvas, position).log()
        return lambda tokens, **_: table[tokens[:, 0], tokens[:, 1], tokens[:, 2]]

    def ancestral(self, steps: int, schedule: str) -> Tensor:
        """The exact distribution of MDLM's sampler, all canvases enumerated: (27,)."""
        chance = {(3, 3, 3): 1.0}
        for step in range(steps):
            p = 1.0
            if step < steps - 1:
                at = get_schedule(schedule).mask_prob(
                    torch.tensor([1 - step / steps, 1 - (step + 1) / steps], dtype=torch.float64)
                )
                p = float(1 - at[1] / at[0])
            following: dict[tuple[int, ...], float] = {}
            for canvas, mass in chance.items():
                choices = []
                for position, token in enumerate(canvas):
                    if token != 3:
                        choices.append([(token, 1.0)])
                    else:
                        words = self.conditional(canvas, position).tolist()
                        choices.append([(3, 1 - p), *[(w, p * q) for w, q in enumerate(words)]])
                for combination in itertools.product(*choices):
                    weight = mass
                    for _, q in combination:
                        weight *= q
                    target = tuple(token for token, _ in combination)
                    following[target] = following.get(target, 0.0) + weight
            chance = following
        return torch.tensor([chance[s] for s in itertools.product(range(3), repeat=3)], dtype=torch.float64)


@pytest.mark.parametrize(("steps", "schedule"), [(2, "loglinear"), (3, "cosine")])
def test_ancestral_sampler_draws_the_enumerated_distribution(steps: int, schedule: str) -> None:
    toy = ToyLanguage()
    expected = toy.ancestral(steps, schedule)
    assert expected.sum().item() == pytest.approx(1)
    # Few steps are not exact: the two can be told apart.
    assert (expected - toy.joint.flatten()).abs().sum() > 0.02
    rows = 4000
    out = generate(
        toy.network(),
        torch.empty(rows, 0).long(),
        gen_length=3,
        steps=steps,
        block_length=3,
        remasking="ancestral",
        schedule=schedule,
        mask_id=3,
        seed=0,
    )
    counts = torch.bincount(out.sequences @ torch.tensor([9, 3, 1]), minlength=27)
    statistic = float(((counts - rows * expected) ** 2 / (rows * expected)).sum())
    assert statistic < 54  # chi-square, 26 degrees of freedom: one in a thousand


@pytest.mark.parametrize("schedule", ["loglinear", "cosine", "linear"])
def test_ancestral_masks_left_follow_the_schedule(schedule: str) -> None:
    length, rows, steps = 4000, 1, 5  # one row: each goes on to its next step at which something is due
    config = SamplingConfig(length, steps, length, remasking="ancestral", schedule=schedule)
    canvas = prompt_canvas(torch.empty(rows, 0).long(), config, mask_id=3, seed=0)

    def predict(tokens: Tensor, **_: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, 4)

    left = [(state.tokens == 3).double().mean().item() for state in denoise(predict, canvas)]
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    p = get_schedule(schedule).mask_prob(times)
    expected = (p[1:] / p[0]).tolist()
    expected[-1] = 0.0  # the last step takes the rest
    assert len(left) == steps
    for got, want in zip(left, expected, strict=True):
        assert got == pytest.approx(want, abs=4 * (want * (1 - want) / (rows * length)) ** 0.5 + 1e-9)


def test_ancestral_skips_forwards_that_change_nothing(
    make_model: MakeModel, random_prompt: RandomPrompt
) -> None:
    out = generate(
        make_model(),
        random_prompt(1, 2),
        gen_length=3,
        steps=200,
        block_length=3,
        remasking="ancestral",
        seed=0,
    )
    assert out.nfe <= 3
    assert sorted(out.reveal_step.unique().tolist()) == list(range(out.nfe))


@pytest.mark.parametrize(("gen_length", "block_length"), [(13, 8), (8, 8), (9, 4), (5, 50)])
def test_without_steps_every_mask_has_a_forward(
    make_model: MakeModel, random_prompt: RandomPrompt, gen_length: int, block_length: int
) -> None:
    out = generate(
        make_model(), random_prompt(2, 3), gen_length=gen_length, steps=None, block_length=block_length
    )
    assert out.nfe == gen_length
    assert (out.reveal_step.sort(1).values == torch.arange(gen_length)).all()


@pytest.mark.parametrize("rule", [{}, {"threshold": 1.0}, {"factor": 0.0}], ids=str)
def test_no_default_bounds_the_forwards(rule: dict) -> None:
    def predict(tokens: Tensor, **_: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, 4)

    assert generate(predict, [[0]], gen_length=150, block_length=150, mask_id=3, **rule).nfe == 150


def test_plan_and_commit_with_a_caller_of_ones_own(
    make_model: MakeModel, random_prompt: RandomPrompt
) -> None:
    """The loop turned inside out: one forward for two canvases of equal width gives what `generate` gives each."""
    model = make_model(6)
    prompts = [random_prompt(2, 4, seed=1), random_prompt(1, 4, seed=2)]
    settings = [SamplingConfig(9, 9, 3, 0.7), SamplingConfig(9, 4, 9, threshold=0.4)]
    canvases = [
        prompt_canvas(p, c, mask_id=MASK, eos_id=EOS, seed=8) for p, c in zip(prompts, settings, strict=True)
    ]
    while any(steps := [plan(canvas) for canvas in canvases]):
        assert all(
            (again := plan(c)) is s is None or torch.equal(again.where, s.where)
            for c, s in zip(canvases, steps, strict=True)
        )
        open_ones = [(canvas, step) for canvas, step in zip(canvases, steps, strict=True) if step]
        tokens = torch.cat([canvas.tokens[step.rows] for canvas, step in open_ones])
        with torch.no_grad():
            logits = model(tokens, logits_at=torch.cat([step.where for _, step in open_ones]))
        counts = [int(step.where.sum()) for _, step in open_ones]
        for (canvas, step), own in zip(open_ones, logits.split(counts), strict=True):
            commit(canvas, step, own)
    for prompt, config, canvas in zip(prompts, settings, canvases, strict=True):
        alone = generate(model, prompt, eos_id=EOS, seed=8, **asdict(config))
        assert torch.equal(canvas.tokens, alone.sequences)
        assert canvas.nfe == alone.nfe


def test_a_rule_that_chooses_nothing_cannot_spin(make_model: MakeModel, random_prompt: RandomPrompt) -> None:
    canvas = prompt_canvas(random_prompt(2, 3), SamplingConfig(6, 6, 6), mask_id=MASK)
    canvas.rules = [Rule(lambda candidates: torch.zeros_like(candidates.exists))] * 2
    model = make_model()
    for _ in range(6):
        step = plan(canvas)
        assert step is not None
        commit(canvas, step, forward(model, canvas, step))
    assert plan(canvas) is None


def test_a_step_costs_as_many_operations_for_many_rows_as_for_one(
    random_prompt: RandomPrompt, any_rule: dict
) -> None:
    """No loop over rows that calls anything, and no device sync for each of them, in planning and committing."""

    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operations += 1
            return function(*args, **(kwargs or {}))

    def operations(rows: int) -> int:
        config = SamplingConfig(12, 3, 6, 0.7, **any_rule)
        canvas = prompt_canvas(random_prompt(rows, 3), config, mask_id=MASK, eos_id=EOS, seed=0)
        generator = torch.Generator().manual_seed(0)
        with Count() as count:
            step = plan(canvas)
            assert step is not None
            commit(canvas, step, torch.randn(int(step.where.sum()), 23, generator=generator))
        calls = 0

        def count_call(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count_call)
        try:
            step = plan(canvas)
        finally:
            sys.setprofile(None)
        assert step is not None
        logits = torch.randn(int(step.where.sum()), 23, generator=generator)
        sys.setprofile(count_call)
        try:
            commit(canvas, step, logits)
        finally:
            sys.setprofile(None)
        return count.operations + calls

    # A loop over rows would take at least one for each.
    assert operations(64) < operations(2) + 62


@pytest.mark.parametrize("drawing", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}], ids=str)
def test_no_rule_copies_the_logits_in_float64(
    random_prompt: RandomPrompt, monkeypatch: pytest.MonkeyPatch, any_rule: dict, drawing: dict[str, Any]
) -> None:
    """V is the widest thing in a step: what is reckoned in float64 over it is a slice at a time."""

    class Widest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
                    self.size = max(self.size, tensor.numel())
            return out

    monkeypatch.setattr("llada.sampling.draw._SLICE", 4000)
    config = SamplingConfig(32, 8, 32, **any_rule, **drawing)
    canvas = prompt_canvas(random_prompt(2, 3), config, mask_id=MASK, eos_id=EOS, seed=0)
    for _ in range(2):
        step = plan(canvas)
        assert step is not None
        logits = torch.randn(int(step.where.sum()), 2000, generator=torch.Generator().manual_seed(0))
        with Widest() as widest:
            commit(canvas, step, logits)
        assert widest.size <= 4000


def test_a_rule_may_say_it_in_numbers() -> None:
    """And rules that are alike are not the same: each chooses for its own rows."""
    tokens = torch.tensor([[MASK, MASK, MASK]] * 4)
    canvas = Canvas(tokens, SamplingConfig(), mask_id=MASK, start=0)
    numbers = Rule(lambda candidates: torch.tensor([[0, 1, 1]]).expand(candidates.shape))
    first = Rule(lambda candidates: torch.arange(3).expand(candidates.shape) == 0)
    for rules, masks in (
        ([numbers] * 4, [[True, False, False]] * 4),
        (
            [numbers, first, dataclasses.replace(first), numbers],
            [[True, False, False], [False, True, True], [False, True, True], [True, False, False]],
        ),
    ):
        canvas = Canvas(tokens, SamplingConfig(), mask_id=MASK, start=0)
        canvas.rules = rules
        step = plan(canvas)
        assert step is not None
        commit(canvas, step, torch.zeros(12, 23))
        assert (canvas.tokens == MASK).tolist() == masks


def test_a_rule_that_chooses_empty_slots_commits_the_first_candidate() -> None:
    """Or the row would never end: slot 2 of a row with one mask holds nothing."""
    tokens = torch.tensor([[MASK, 0, 0], [MASK, MASK, MASK]])
    canvas = Canvas(tokens, SamplingConfig(), mask_id=MASK, start=0)
    canvas.rules = [Rule(lambda candidates: torch.arange(3).expand(candidates.shape) == 2)] * 2
    step = plan(canvas)
    assert step is not None
    commit(canvas, step, torch.zeros(4, 23))
    assert (canvas.tokens == MASK).tolist() == [[False, False, False], [True, True, False]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "knobs", [{}, {"temperature": 1.0}, {"remasking": "random"}, {"threshold": 0.5}], ids=str
)
def test_logits_that_are_no_numbers_end_the_run(
    make_model: MakeModel, random_prompt: RandomPrompt, value: float, knobs: dict
) -> None:
    model = make_model()
    with torch.no_grad():
        model.layers[1].o_proj.weight[3, 4] = value
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        generate(model, random_prompt(1, 3), gen_length=4, steps=4, **knobs)


def test_single_ids_may_be_ruled_out_by_the_network() -> None:
    def predict(tokens: Tensor, **_: Tensor) -> Tensor:
        return torch.tensor([-torch.inf, 1.0, 2.0, 0.0]).expand(*tokens.shape, 4)

    out = generate(predict, [[1]], gen_length=3, steps=3, mask_id=3, temperature=1.0, seed=0)
    assert set(out.sequences[0].tolist()) <= {1, 2}
    with pytest.raises(FloatingPointError):
        generate(
            lambda tokens, **_: torch.full((*tokens.shape, 4), -torch.inf), [[1]], gen_length=3, mask_id=3
        )


def test_what_is_equal_but_for_rounding_is_decided_by_place_and_id() -> None:
    """Whichever way the last bits fall, the lowest position goes first and gets the lowest id."""
    generator = torch.Generator().manual_seed(0)

    def predict(tokens: Tensor, **_: Tensor) -> Tensor:
        logits = torch.tensor([0.0, 9.0, 9.0, 3.0]).expand(*tokens.shape, 4)
        return logits + 3e-6 * torch.randn(logits.shape, generator=generator)

    for _ in range(8):
        for rule in ({}, *PARALLEL[:2], {"entropy_bound": 0.0}):
            out = generate(predict, [[1]], gen_length=5, steps=5, mask_id=3, **{"threshold": None, **rule})
            assert out.sequences[0].tolist() == [1] * 6
            if "factor" not in rule and "threshold" not in rule:
                assert out.reveal_step[0].tolist() == [0, 1, 2, 3, 4]
        clear = torch.tensor([[0.0, 9.0, 9.002, 3.0]])  # no rounding: the higher one
        assert draw_tokens(clear.double(), 0.0, torch.zeros(1).long(), 1e-5).tolist() == [2]


@pytest.mark.parametrize("rule", [{}, {"threshold": 0.99}, {"remasking": "random"}], ids=str)
def test_nothing_stays_behind_the_first_eos(rule: dict) -> None:
    """The end is committed last of all, in front of words that came first."""

    def predict(tokens: Tensor, **_: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 6)
        logits[..., 4] = 6.0
        logits[:, 3, EOS] = 6.5
        logits[:, 3, 4] = 6.4
        return logits

    knobs: dict[str, Any] = {"gen_length": 6, "steps": 6, "mask_id": 5, "seed": 3, **rule}
    free = generate(predict, [[4, 3]], **knobs)
    assert free.sequences.tolist() == [[4, 3, 4, 1, 4, 4, 4, 4]]
    out = generate(predict, [[4, 3]], eos_id=EOS, **knobs)
    assert out.sequences.tolist() == [[4, 3, 4, 1, 1, 1, 1, 1]]
    assert (out.reveal_step[0, 2:] == -1).all()
    assert (out.reveal_step[0, :2] >= 0).all()
    either = generate(predict, [[4, 3]], eos_id=[0, EOS], **knobs)
    assert either.sequences.tolist() == [[4, 3, 4, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("block_length", [32, 8])
def test_few_steps_are_enough_for_every_rule(
    make_model: MakeModel, random_prompt: RandomPrompt, any_rule: dict, block_length: int
) -> None:
    config = SamplingConfig(gen_length=32, steps=5, block_length=block_length, **any_rule)
    canvas = prompt_canvas(random_prompt(1, 4), config, mask_id=MASK, seed=1)
    for _ in denoise(make_model(), canvas):
        pass
    assert canvas.nfe <= 5
    assert not (canvas.tokens == MASK).any()
    assert (canvas.reveal_step[:, 4:] >= 0).all()


@pytest.mark.parametrize(
    "rule",
    [
        {"threshold": 1.0},
        {"factor": 0.0},
        {"entropy_bound": 0.0},
        {"error_bound": 0.0},
        {"leap_threshold": 1.0, "leap_anchor": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("steps", "block_length"), [(2, 32), (5, 8), (4, 8), (31, 32)])
def test_steps_bound_the_forwards_of_every_rule(
    make_model: MakeModel, random_prompt: RandomPrompt, rule: dict, steps: int, block_length: int
) -> None:
    out = generate(
        make_model(), random_prompt(2, 4), gen_length=32, steps=steps, block_length=block_length, **rule
    )
    assert out.nfe == steps
    assert not (out.sequences == MASK).any()


@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "random", "first_hitting", "ancestral"])
def test_temperature_zero_gives_the_same_text_each_time(
    make_model: MakeModel, random_prompt: RandomPrompt, remasking: str
) -> None:
    knobs: dict[str, Any] = {"gen_length": 12, "steps": 12, "remasking": remasking}
    model, prompt = make_model(), random_prompt(1, 4)
    texts = {tuple(generate(model, prompt, temperature=0.0, **knobs).sequences[0].tolist()) for _ in range(4)}
    assert len(texts) == 1
    if remasking in ("ancestral", "first_hitting"):  # which samples, unless it is told not to
        texts = {tuple(generate(model, prompt, **knobs).sequences[0].tolist()) for _ in range(4)}
        assert len(texts) > 1
        hot, said = (
            generate(model, prompt, seed=3, **knobs, **t).sequences for t in ({}, {"temperature": 1.0})
        )
        assert torch.equal(hot, said)


def test_few_rows_of_a_padded_batch_differ_in_bfloat16(
    make_model: MakeModel, random_prompt: RandomPrompt
) -> None:
    """No promise but a measure: none of 60 on a CPU; 8 when they were padded, 18 when positions counted from the padding."""
    lengths, different = (9, 3, 6, 1), 0
    for seed in range(5):
        model = make_model(seed).to(torch.bfloat16)
        prompts = [random_prompt(1, length, seed)[0].tolist() for length in lengths]
        for temperature in (0.0, 0.5, 1.0):
            knobs: dict[str, Any] = {
                "gen_length": 16,
                "steps": 16,
                "block_length": 8,
                "temperature": temperature,
            }
            together = generate(model, prompts, seed=[1, 2, 3, 4], **knobs).sequences[:, -16:]
            for row, prompt in enumerate(prompts):
                alone = generate(model, [prompt], seed=[row + 1], **knobs).sequences[0, -16:]
                different += not torch.equal(together[row], alone)
    assert different < 13


@pytest.mark.parametrize("function", ["generate", "infill"])
def test_batch_invariant_reaches_every_product(
    make_model: MakeModel, watch_products: Callable[[Transformer], set[int]], function: str
) -> None:
    model = make_model()
    rows = watch_products(model)
    if function == "generate":
        generate(model, [[3, 4], [5]], gen_length=6, block_length=3, batch_invariant=True)
    else:
        infill(model, torch.tensor([[3, 22, 22, 4]]), batch_invariant=True)
    assert rows == {64}
