"""Coins that are tossed beforehand, against the chances of each step, and what is sampled with them, against enumeration."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llada.diffusion.schedule import get_schedule
from llada.sampling.canvas import Canvas, prompt_canvas
from llada.sampling.coins import (
    NEVER,
    Chances,
    remdm_chances,
    return_by_remdm,
    spread,
    unmask_probability,
    unmasked_by,
)
from llada.sampling.config import SamplingConfig
from llada.sampling.generate import generate


def test_unmask_probability_is_equation_7() -> None:
    for name in ("loglinear", "cosine2", "geometric"):
        schedule = get_schedule(name)
        t, s = torch.tensor([0.7, 0.4], dtype=torch.float64)
        expected = (schedule.alpha(s) - schedule.alpha(t)) / (1 - schedule.alpha(t))
        assert float(unmask_probability(schedule, t, s)) == pytest.approx(float(expected))


@pytest.mark.parametrize("name", ["loglinear", "cosine", "geometric"])
def test_coins_of_all_steps_are_one_number(name: str) -> None:
    """P(unmasked by step k) is what independent coins with MDLM's chances at each step give."""
    schedule, steps = get_schedule(name), 7
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    chance = unmask_probability(schedule, times[:-1], times[1:])
    chance[-1] = 1.0
    torch.testing.assert_close(unmasked_by(schedule, steps), 1 - (1 - chance).cumprod(0))


@pytest.mark.parametrize("name", ["loglinear", "cosine", "llada"])
@pytest.mark.parametrize("cap", [0.0, 0.02, 0.5, 1.0])
def test_remdm_leaves_as_many_masks_as_without(name: str, cap: float) -> None:
    """P(masked) after each step follows the schedule, whatever goes back; without a cap, every token goes back that can."""
    schedule, steps = get_schedule(name), 6
    chances = remdm_chances(schedule, steps, cap)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    masked = 1.0
    for step in range(steps - 1):
        unmask, remask = float(chances.unmask[step]), float(chances.remask[step])
        assert 0 <= unmask <= 1
        assert 0 <= remask <= cap
        masked = masked * (1 - unmask) + (1 - masked) * remask
        expected = schedule.mask_prob(times[step + 1]) / schedule.mask_prob(times[0])
        assert masked == pytest.approx(float(expected), abs=2e-3)  # schedules end at 1 − ε
    assert (float(chances.unmask[-1]), float(chances.remask[-1])) == (1.0, 0.0)
    if cap == 0:
        torch.testing.assert_close(chances.unmask[:-1], unmask_probability(schedule, times[:-2], times[1:-1]))
    if cap == 1:
        assert float(chances.unmask[2]) == pytest.approx(1, abs=2e-3) or float(chances.remask[2]) == 1


class ToyNetwork:
    """Three positions, three words (the mask is 3), and any conditionals: none of one joint, so that the order tells."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(4, 4, 4, 3, 3, generator=generator, dtype=torch.float64) * 2

    def network(self) -> Callable[..., Tensor]:
        table = torch.nn.functional.pad(self.table, (0, 1), value=9.0)  # the mask's logit must not matter
        return lambda tokens, **_: table[tokens[:, 0], tokens[:, 1], tokens[:, 2]]

    def after_step(self, chance: dict, unmask: float, remask: float) -> dict:
        """The distribution over canvases, of a step on from another: each position for itself."""
        following: dict[tuple[int, ...], float] = {}
        for canvas, mass in chance.items():
            choices = []
            for position, token in enumerate(canvas):
                if token != 3:
                    choices.append([(token, 1 - remask), (3, remask)])
                    continue
                words = self.table[canvas][position].softmax(0).tolist()
                choices.append([(3, 1 - unmask), *[(w, unmask * q) for w, q in enumerate(words)]])
            for combination in itertools.product(*choices):
                weight = mass * math.prod(q for _, q in combination)
                target = tuple(token for token, _ in combination)
                following[target] = following.get(target, 0.0) + weight
        return following

    def by_chances(self, chances: Chances) -> Tensor:
        """(27,) exact."""
        chance = {(3, 3, 3): 1.0}
        for unmask, remask in zip(*(x.tolist() for x in chances), strict=True):
            chance = self.after_step(chance, unmask, remask)
        return self.as_tensor(chance)

    def one_by_one(self) -> Tensor:
        """(27,) exact, any order as likely as any other."""
        total = torch.zeros(27, dtype=torch.float64)
        for order in itertools.permutations(range(3)):
            chance: dict[tuple[int, ...], float] = {(3, 3, 3): 1.0}
            for position in order:
                following: dict[tuple[int, ...], float] = {}
                for canvas, mass in chance.items():
                    for word, q in enumerate(self.table[canvas][position].softmax(0).tolist()):
                        target = (*canvas[:position], word, *canvas[position + 1 :])
                        following[target] = following.get(target, 0.0) + mass * q
                chance = following
            total += self.as_tensor(chance) / 6
        return total

    @staticmethod
    def as_tensor(chance: dict) -> Tensor:
        return torch.tensor(
            [chance.get(c, 0.0) for c in itertools.product(range(3), repeat=3)], dtype=torch.float64
        )

    def sample(self, rows: int, **knobs: Any) -> tuple[Tensor, Tensor]:
        """How often each text came (27,), and at which forward each token did (rows, 3)."""
        out = generate(
            self.network(),
            torch.empty(rows, 0).long(),
            gen_length=3,
            block_length=3,
            mask_id=3,
            seed=0,
            **knobs,
        )
        return torch.bincount(out.sequences @ torch.tensor([9, 3, 1]), minlength=27), out.reveal_step


def chi_square(counts: Tensor, expected: Tensor) -> float:
    expected = expected * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


LIMIT = 54.1  # of 26 degrees of freedom: one in a thousand


def ancestral_chances(steps: int, schedule: str) -> Chances:
    return remdm_chances(get_schedule(schedule), steps, 0.0)


def test_first_hitting_samples_one_by_one_in_any_order() -> None:
    toy = ToyNetwork()
    expected = toy.one_by_one()
    assert expected.sum().item() == pytest.approx(1)
    counts, revealed = toy.sample(6000, remasking="first_hitting", steps=None)
    assert chi_square(counts, expected) < LIMIT
    assert (revealed.sort(1).values == torch.arange(3)).all()  # a forward for each token
    orders = torch.unique(revealed, dim=0, return_counts=True)[1]
    assert chi_square(orders, torch.full((6,), 1 / 6, dtype=torch.float64)) < 20.5  # 5 degrees of freedom
    left_to_right = toy.sample(6000, remasking="first_hitting", steps=1)[0]
    assert chi_square(left_to_right, expected) > 5 * LIMIT  # all at once is another thing, and can be told


def test_first_hitting_is_the_ancestral_sampler_with_infinitely_many_steps() -> None:
    toy = ToyNetwork()
    limit = toy.one_by_one()
    for schedule in ("loglinear", "cosine"):
        apart = [
            float((toy.by_chances(ancestral_chances(steps, schedule)) - limit).abs().sum())
            for steps in (4, 16, 64, 256)
        ]
        assert all(later < earlier / 3 for earlier, later in itertools.pairwise(apart))  # O(1 / steps)
        assert apart[-1] < 0.01


@pytest.mark.parametrize(("cap", "steps", "schedule"), [(0.3, 4, "loglinear"), (1.0, 5, "cosine")])
def test_remdm_samples_the_enumerated_distribution(cap: float, steps: int, schedule: str) -> None:
    toy = ToyNetwork()
    expected = toy.by_chances(remdm_chances(get_schedule(schedule), steps, cap))
    assert expected.sum().item() == pytest.approx(1)
    counts, revealed = toy.sample(8000, remdm_cap=cap, steps=steps, schedule=schedule)
    assert chi_square(counts, expected) < LIMIT
    assert chi_square(counts, toy.by_chances(ancestral_chances(steps, schedule))) > 2 * LIMIT
    assert int(revealed.max()) < steps


def test_remdm_without_remasking_is_ancestral() -> None:
    toy = ToyNetwork()
    counts, _ = toy.sample(6000, remdm_cap=0.0, steps=4)
    assert chi_square(counts, toy.by_chances(ancestral_chances(4, "loglinear"))) < LIMIT


def test_tokens_go_back_with_the_chance_of_each_step() -> None:
    """From one step on, the steps at which tokens become masks again and at which those are unmasked."""
    steps, rows, at = 6, 20_000, 1
    config = SamplingConfig(1, steps, 1, remdm_cap=0.4)
    canvas = prompt_canvas(torch.empty(rows, 0).long(), config, mask_id=3, seed=0)
    canvas.steps_of[:] = steps
    canvas.due[:] = at
    again, due = return_by_remdm(canvas, torch.arange(rows), torch.ones(rows, 1, dtype=torch.bool))
    chances = remdm_chances(get_schedule("loglinear"), steps, 0.4)
    stays = (1 - chances.remask[at + 1 :]).prod()
    assert float((again == NEVER).double().mean()) == pytest.approx(float(stays), abs=0.015)
    assert ((due == NEVER) == (again == NEVER)).all()
    back = again < NEVER
    assert (again[back] > at).all()
    assert (due[back] > again[back]).all()
    assert int(due[back].max()) == steps - 1
    first = float((again == at + 1).double().mean())
    assert first == pytest.approx(float(chances.remask[at + 1]), abs=0.015)
    soon = back & (again == at + 1)
    assert float((due[soon] == at + 2).double().mean()) == pytest.approx(
        float(chances.unmask[at + 2]), abs=0.02
    )


def test_spread_numbers_are_uniform_each_and_even_together() -> None:
    generator = torch.Generator().manual_seed(0)
    group = torch.tensor([2, 0, 2, 2, 0, 2, 2, 3])  # nobody is in 1
    numbers = torch.stack(
        [
            spread(
                torch.rand(8, generator=generator, dtype=torch.float64),
                group,
                torch.rand(4, generator=generator, dtype=torch.float64),
            )
            for _ in range(2000)
        ]
    )
    assert ((numbers >= 0) & (numbers < 1)).all()
    for position in range(8):  # each alone
        counts = torch.histc(numbers[:, position], 10, 0, 1)
        assert chi_square(counts, torch.full((10,), 0.1)) < 27.9  # 9 degrees of freedom
    for x in (0.13, 0.5, 0.9):  # together
        below = (numbers[:, group == 2] < x).sum(1)
        assert set(below.tolist()) <= {math.floor(5 * x), math.ceil(5 * x)}
        assert float(below.double().mean()) == pytest.approx(5 * x, abs=0.05)
    # Which position gets which part is as random as before.
    ranks = numbers[:, group == 2].argsort(1)
    assert chi_square(torch.bincount(ranks[:, 0], minlength=5), torch.full((5,), 0.2)) < 18.5


def masks_left_after(step: int, **knobs: Any) -> Tensor:
    """(rows,) how many of 12 masks are not due by a step of 6."""
    config = SamplingConfig(12, 6, 12, **knobs)
    canvas = prompt_canvas(torch.empty(1500, 0).long(), config, mask_id=3, seed=0)
    return (canvas.due > step).sum(1).double()


@pytest.mark.parametrize("rule", [{"remasking": "ancestral"}, {"remdm_cap": 0.1}], ids=str)
def test_stratified_coins_vary_less_and_mean_the_same(rule: dict) -> None:
    for step in range(5):
        plain, even = masks_left_after(step, **rule), masks_left_after(step, stratified=True, **rule)
        expected = 12 * (1 - (step + 1) / 6) if "remasking" in rule else plain.mean()
        assert float(even.mean()) == pytest.approx(float(expected), abs=0.2)
        assert float(even.max() - even.min()) <= 1
        assert float(plain.var()) > 3 * float(even.var())


def test_stratified_coins_are_a_rows_own() -> None:
    """Blocks and rows of a batch are spread for themselves; where given tokens stand there is no coin to take a part."""
    config = SamplingConfig(8, 8, 4, remasking="ancestral", stratified=True)
    rows = torch.tensor([[7, 3, 3, 3, 3, 3, 7, 3, 3], [7, 7, 3, 3, 3, 3, 3, 3, 3]])
    both = Canvas(rows, config, mask_id=3, start=1, seed=[5, 6])
    for row in range(2):
        alone = Canvas(rows[row : row + 1], config, mask_id=3, start=1, seed=5 + row)
        assert torch.equal(both.due[row], alone.due[0])
    few = [Canvas(rows[:1], config, mask_id=3, start=1, seed=s).due[0, [5, 7, 8]] for s in range(300)]
    thirds = (torch.stack(few) < 2).sum(1)  # 3 masks, half of 4 steps
    assert set(thirds.tolist()) <= {1, 2}
