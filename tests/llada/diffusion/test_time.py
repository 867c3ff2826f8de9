"""Noise levels: where the samplers put them, and that every combination leaves the loss unbiased."""

import pytest
import torch
from torch import Tensor

from llada.diffusion.noise import row_keys, row_uniforms, stream_key
from llada.diffusion.objective import forward_process
from llada.diffusion.schedule import SCHEDULES, get_schedule
from llada.diffusion.time import TimeConfig, sample_uniform, time_and_weight
from llada.errors import UserError

SAMPLINGS = ("stratified", "independent", "sobol")
REFUSED = {("importance", 0.0, name) for name in ("loglinear", "cosine", "cosine2")} | {
    ("importance", t_min, "bert") for t_min in (0.0, 0.05, 0.3)
}


def draw(sampling: str, batch: int, *, seed: int = 0, step: int = 0, slots: Tensor | None = None) -> Tensor:
    """u of these slots of one global batch whose row in slot s is sample 3·s + 1 of epoch 2."""
    slots = torch.arange(batch) if slots is None else slots
    return sample_uniform(
        sampling,
        seed=seed,
        step=step,
        slots=slots,
        batch=batch,
        epochs=torch.full_like(slots, 2),
        sample_ids=3 * slots + 1,
    )


@pytest.mark.parametrize("batch", [7, 1280])
def test_stratified_times_take_one_of_each_stratum(batch: int) -> None:
    first, second = draw("stratified", batch), draw("stratified", batch, step=1)
    for u in (first, second):
        assert torch.equal((u * batch).floor().long().sort().values, torch.arange(batch))
        inside = u * batch % 1
        assert inside.std() > 0.15  # each stratum has noise of its own, not one shared offset
    assert (first - second).abs().max() > 0.1 / batch


@pytest.mark.parametrize("sampling", ["stratified", "sobol"])
@pytest.mark.parametrize("workers", [1, 5, 8, 64])
def test_micro_batches_are_alike(sampling: str, workers: int) -> None:
    """Eight rows that one worker takes together have all noise levels: none needs memory for masks alone."""
    for step in range(10):
        levels = draw(sampling, 1280, step=step)
        means = torch.stack([levels[rank::workers].unfold(0, 8, 8).mean(1) for rank in range(workers)])
        assert means.min() > 0.1
        assert means.max() < 0.9


def test_sobol_blocks_of_powers_of_two_are_stratified_over_the_run() -> None:
    u = torch.cat([draw("sobol", 4, step=step) for step in range(16)])
    for n in (4, 8, 16, 32, 64):
        for block in u.split(n):
            assert sorted((block * n).long().tolist()) == list(range(n))
    assert not torch.equal(u[:4], draw("sobol", 4, seed=1))


def test_independent_times_belong_to_the_sample() -> None:
    reference = draw("independent", 100)
    assert torch.equal(draw("independent", 100, step=9), reference)  # the step and the batch do not matter
    assert (draw("independent", 100, seed=1) - reference).abs().max() > 0.1
    mixed = sample_uniform(
        "independent",
        seed=0,
        step=0,
        slots=torch.tensor([5, 6]),
        batch=8,
        epochs=torch.tensor([1, 2]),
        sample_ids=torch.tensor([1, 1]),
    )
    assert mixed[1] == reference[0]
    assert mixed[0] != reference[0]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_times_are_the_same_on_any_worker(sampling: str) -> None:
    whole = draw(sampling, 12, step=3)
    for workers in (2, 3):
        for rank in range(workers):
            mine = torch.arange(rank, 12, workers)
            assert torch.equal(draw(sampling, 12, step=3, slots=mine), whole[mine])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_times_are_uniform(sampling: str) -> None:
    u = draw(sampling, 40_000 if sampling == "independent" else 100)
    counts = torch.bincount((u * 10).long(), minlength=10).double() / len(u)
    assert u.min() >= 0
    assert u.max() < 1
    # Independent: standard deviation 0.0015; the others are even up to one point in each of the ten.
    assert (counts - 0.1).abs().max() < (0.0075 if sampling == "independent" else 0.021)


@pytest.mark.parametrize(("t_min", "t_max"), [(0.0, 1.0), (0.05, 0.9), (0.3, 0.8)], ids=str)
@pytest.mark.parametrize("density", ["uniform", "importance", "bell"])
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_weights_leave_the_loss_unbiased(name: str, density: str, t_min: float, t_max: float) -> None:
    schedule = get_schedule(name)
    config = TimeConfig(density=density, t_min=t_min, t_max=t_max, bell_center=0.4)  # type: ignore[arg-type]
    n = 1 << 14
    middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    # The midpoint rule over s of u = s²(3 − 2s), which is fine at the ends, where a bell's weights are steep.
    middle, du = middle**2 * (3 - 2 * middle), 6 * middle * (1 - middle)
    if (density, t_min, name) in REFUSED:
        with pytest.raises(ValueError, match="t_min"):
            time_and_weight(middle, schedule, config)
        return
    t, weight = time_and_weight(middle, schedule, config)
    assert t.min() >= t_min - 1e-12
    assert t.max() <= config.t_max + 1e-12
    # E over u of weight × P(masked).
    assert (weight * schedule.mask_prob(t) * du).mean().item() == pytest.approx(1, abs=1e-6)
    # And the mean is not right by accident: every level of the mask probability gets its share of the bound,
    # E[weight × masked; p < q] = (q − p₀) / (p₁ − p₀) (for LLaDA too, whose constant is dropped everywhere alike).
    if name != "bert":
        p = schedule.mask_prob(t)
        ends = schedule.mask_prob(torch.tensor([config.t_min, config.t_max], dtype=torch.float64))
        for share in (0.1, 0.5, 0.8):
            below = p < ends[0] + share * (ends[1] - ends[0])
            # One midpoint may be on the edge.
            assert (weight * p * below * du).mean().item() == pytest.approx(share, abs=5e-4)
    for sampling in SAMPLINGS:
        u = draw(sampling, n)
        t, weight = time_and_weight(u, schedule, config)
        terms = weight * schedule.mask_prob(t)
        # One point in each stratum: as wrong as the terms vary, by Koksma's inequality.
        error = float(terms.std()) / n**0.5 if sampling == "independent" else max(10, float(terms.max())) / n
        assert terms.mean().item() == pytest.approx(1, abs=4.5 * error + 1e-6), sampling


@pytest.mark.parametrize(
    ("name", "density"),
    [
        (n, d)
        for n in SCHEDULES
        for d in ("uniform", "importance", "bell")
        if (n, d) != ("bert", "importance")
    ],
)
def test_weighted_masks_average_to_one_at_every_position(name: str, density: str) -> None:
    config = TimeConfig(density=density, t_min=0.02)  # type: ignore[arg-type]
    rows, length = 40_000, 6
    schedule = get_schedule(name)
    t, weight = time_and_weight(draw("stratified", rows), schedule, config)
    uniform = row_uniforms(row_keys(stream_key(0, "train-mask", 0), 3 * torch.arange(rows) + 1), length)
    noisy = forward_process(
        torch.zeros(rows, length).long(), t=t, schedule=schedule, mask_id=1, uniform=uniform, weight=weight
    )
    weighted = noisy.weight[:, None] * noisy.masked
    error = weighted.std(0) / rows**0.5
    assert ((weighted.mean(0) - 1).abs() < 4 * error).all()


@pytest.mark.parametrize(("t_min", "t_max"), [(0.0, 1.0), (0.3, 0.8)], ids=str)
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "bert"])
def test_the_steps_of_discrete_time_cover_the_bound_once(name: str, t_min: float, t_max: float) -> None:
    """Weight × P(masked) of the level t is T times the share of tokens that the step from t to the next level restores."""
    T, schedule = 7, get_schedule(name)
    edges = torch.linspace(t_min, t_max, T + 1, dtype=torch.float64)
    u = torch.tensor(
        [(i + inside) / T for i in range(T) for inside in (0.0, 0.5, 0.999)], dtype=torch.float64
    )
    t, weight = time_and_weight(u, schedule, TimeConfig(levels=T, t_min=t_min, t_max=t_max))
    torch.testing.assert_close(t, edges[1:].repeat_interleave(3))
    p = schedule.mask_prob(edges)
    shares = p.diff() / (p[-1] - p[0])
    torch.testing.assert_close((weight * schedule.mask_prob(t))[::3], T * shares)
    assert (weight * schedule.mask_prob(t)).mean().item() == pytest.approx(1)


def test_discrete_time_of_many_levels_is_continuous_time() -> None:
    schedule, u = get_schedule("cosine"), torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    many, continuous = (time_and_weight(u, schedule, TimeConfig(levels=levels)) for levels in (1_000_000, 0))
    torch.testing.assert_close(many, continuous, rtol=1e-4, atol=1e-6)


def test_discrete_time_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(UserError, match="levels 10 are uniform, which density bell is not"):
        TimeConfig(levels=10, density="bell")
    with pytest.raises(UserError, match="set levels to 0"):
        time_and_weight(torch.rand(3), get_schedule("bert"), TimeConfig(levels=10))


def test_lladas_weight_over_the_whole_range_is_its_own() -> None:
    u = torch.linspace(0, 0.99, 20, dtype=torch.float64)
    t, weight = time_and_weight(u, get_schedule("llada"), TimeConfig())
    assert torch.equal(t, u)
    torch.testing.assert_close(weight, 1 / (0.999 * u + 0.001))


def test_bell_shaped_times_are_a_normal_distribution_without_its_ends() -> None:
    """Against the plain way: draw from the whole normal distribution, throw away what lies outside."""
    config = TimeConfig(density="bell", t_min=0.1, t_max=0.9, bell_center=0.7, bell_width=0.3)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t, _ = time_and_weight(u, get_schedule("llada"), config)
    drawn = 0.7 + 0.3 * torch.randn(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = drawn[(drawn > 0.1) & (drawn < 0.9)]
    grid = torch.linspace(0.1, 0.9, 33, dtype=torch.float64)
    cumulated, expected = ((x[:, None] <= grid).double().mean(0) for x in (t, plain))
    assert (cumulated - expected).abs().max() < 0.004  # of 300,000 draws: four deviations
    assert (t.diff() > 0).all()


def test_the_ends_of_a_narrow_bell_have_finite_weights() -> None:
    config = TimeConfig(density="bell", bell_center=0.5, bell_width=0.1)
    u = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    t, weight = time_and_weight(u, get_schedule("llada"), config)
    assert t.tolist() == pytest.approx([0, 0, 0.5, 1], abs=1e-6)
    assert torch.isfinite(weight).all()


def test_bad_time_ranges_are_refused() -> None:
    for t_min, t_max, named in ((0.5, 0.5, "t_min 0.5"), (-0.1, 1.0, "t_min must"), (0.0, 1.1, "t_max must")):
        with pytest.raises(UserError, match=f"time: {named}"):
            TimeConfig(t_min=t_min, t_max=t_max)
    for bad in ({"sampling": "latin"}, {"density": "normal"}):
        with pytest.raises(UserError, match=f"time: {next(iter(bad))} must be one of"):
            TimeConfig(**bad)  # type: ignore[arg-type]


def test_importance_density_needs_a_lowest_mask_probability() -> None:
    with pytest.raises(UserError, match="raise t_min"):
        time_and_weight(torch.rand(3), get_schedule("loglinear"), TimeConfig(density="importance"))
