"""Noise schedules: their parts agree with one another and with the forward process."""

import pytest
import torch

from llada.diffusion.noise import row_keys, row_uniforms, stream_key
from llada.diffusion.objective import forward_process
from llada.diffusion.schedule import SCHEDULES, NoiseSchedule, get_schedule
from llada.errors import UserError

NAMES = list(SCHEDULES)
DIFFUSION = [name for name in NAMES if name != "bert"]
T = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_alpha_sigma_and_mask_prob_agree(name: str) -> None:
    schedule = get_schedule(name)
    torch.testing.assert_close(schedule.alpha(T), torch.exp(-schedule.sigma(T)))
    torch.testing.assert_close(schedule.mask_prob(T), 1 - schedule.alpha(T))


@pytest.mark.parametrize("name", NAMES)
def test_dsigma_is_the_derivative_of_sigma(name: str) -> None:
    schedule, t = get_schedule(name), T.clone().requires_grad_()
    sigma = schedule.sigma(t)
    slope = torch.zeros_like(t)
    if sigma.requires_grad:
        (slope,) = torch.autograd.grad(sigma.sum(), t)
    torch.testing.assert_close(schedule.dsigma(T), slope)


@pytest.mark.parametrize("name", DIFFUSION)
def test_weight_is_that_of_the_bound(name: str) -> None:
    schedule = get_schedule(name)
    bound = schedule.dsigma(T) * schedule.alpha(T) / (1 - schedule.alpha(T))  # −α′ / (1 − α)
    # LLaDA leaves out the constant 1 − ε.
    constant = 1 / (1 - schedule.eps) if name == "llada" else 1.0  # type: ignore[attr-defined]
    torch.testing.assert_close(schedule.weight(T), constant * bound)


@pytest.mark.parametrize("name", DIFFUSION)
def test_time_at_inverts_mask_prob(name: str) -> None:
    schedule = get_schedule(name)
    t = torch.cat([torch.tensor([0.0, 1e-6], dtype=torch.float64), T, torch.ones(1, dtype=torch.float64)])
    # At 1e-6 the mask probability of cosine noise is 1e-12: float64 leaves an absolute error of 1e-10 in t.
    torch.testing.assert_close(schedule.time_at(schedule.mask_prob(t)), t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.2, 0.7)])
def test_mass_is_the_integral_of_weight_times_mask_prob(name: str, ends: tuple[float, float]) -> None:
    schedule = get_schedule(name)
    n = 20_000
    middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n * (ends[1] - ends[0]) + ends[0]
    integral = (schedule.weight(middle) * schedule.mask_prob(middle)).mean() * (ends[1] - ends[0])
    assert schedule.mass(*ends) == pytest.approx(integral.item(), rel=1e-7)


@pytest.mark.parametrize("name", DIFFUSION)
def test_alpha_falls(name: str) -> None:
    schedule = get_schedule(name)
    assert (schedule.alpha(T).diff() < 0).all()
    assert schedule.mask_prob(torch.zeros(1)).item() <= 1.001e-3
    assert schedule.mask_prob(torch.ones(1)).item() > 0.63  # geometric ends at 1 − 1/e, the others near 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("t", [0.0, 0.03, 0.5, 1.0])
def test_tokens_are_masked_at_the_schedules_rate(name: str, t: float) -> None:
    rows, length = 200, 1000
    uniform = row_uniforms(row_keys(stream_key(0, "train-mask", 0), torch.arange(rows)), length)
    tokens = torch.full((rows, length), 5)
    noisy = forward_process(tokens, t=torch.full((rows,), t), schedule=name, mask_id=9, uniform=uniform)
    p = float(1 - get_schedule(name).alpha(torch.tensor(t, dtype=torch.float64)))
    sigma = (max(p * (1 - p), 0.0) / (rows * length)) ** 0.5
    assert noisy.masked.double().mean().item() == pytest.approx(p, abs=4.5 * sigma + 1e-7)
    by_position = noisy.masked.double().mean(0)
    # 1000 positions of 200 rows: the worst of them stays within five standard deviations (skewed when p is small).
    assert (by_position - p).abs().max() <= 5 * (p * (1 - p) / rows) ** 0.5 + 4 / rows


def test_unknown_schedule_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"noise schedule 'polynomial'.*loglinear"):
        get_schedule("polynomial")
    schedule: NoiseSchedule = SCHEDULES["cosine2"]
    assert get_schedule(schedule) is schedule
