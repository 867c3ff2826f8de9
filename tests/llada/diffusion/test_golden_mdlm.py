"""Schedules, time sampling, SUBS, both bounds and the reverse step against numbers of the MDLM code."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llada.diffusion.cross_entropy import token_cross_entropy
from llada.diffusion.objective import NoisyBatch, masked_diffusion_loss
from llada.diffusion.schedule import Cosine, Geometric, Linear, LogLinear, NoiseSchedule
from llada.diffusion.time import TimeConfig, stratify, time_and_weight
from llada.sampling.coins import unmask_probability

FAMILIES: dict[str, tuple[type[NoiseSchedule], dict[str, int]]] = {
    "loglinear": (LogLinear, {}),
    "cosine": (Cosine, {"power": 1}),
    "cosinesqr": (Cosine, {"power": 2}),
    "linear": (Linear, {}),
    "geometric": (Geometric, {}),
}


@pytest.fixture
def golden(golden_dir: Path) -> dict[str, list[dict]]:
    return json.loads((golden_dir / "mdlm.json").read_text())


def build_schedule(case: dict) -> NoiseSchedule:
    family, fixed = FAMILIES[case["schedule"]]
    return family(**fixed, **case["params"])


def wide(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def with_minus_infinity(values: list) -> Tensor:
    """A nested list in which null stands for minus infinity."""
    return wide([[[-math.inf if v is None else v for v in row] for row in rows] for rows in values])


def subs_log_probs(logits: Tensor, tokens: Tensor, mask_id: int) -> Tensor:
    """MDLM's SUBS parameterisation of log p(x₀ | xₜ), (B, L, V), by our cross-entropy of every candidate: the mask has
    probability zero, and a token that is still there is certain (upstream's diffusion.py:261-277, with −∞ for its −1e6).
    """
    B, L, V = logits.shape
    candidates = torch.arange(V).expand(B, L, V)
    rows = logits[:, :, None].expand(B, L, V, V)
    nats = token_cross_entropy(rows.reshape(-1, V), candidates.reshape(-1), excluded_id=mask_id)
    certain = torch.full_like(logits, -math.inf).scatter(-1, tokens[..., None], 0.0)
    return torch.where((tokens == mask_id)[..., None], -nats.view(B, L, V), certain)


def test_schedules_equal_the_float64_reference(golden: dict[str, list[dict]]) -> None:
    assert {case["schedule"] for case in golden["schedules"]} == set(FAMILIES)
    for case in golden["schedules"]:
        schedule, t, expected = build_schedule(case), wide(case["t"]), case["float64"]
        functions = {
            "sigma": schedule.sigma,
            "dsigma": schedule.dsigma,
            "move_chance": schedule.mask_prob,
            "loss_weight": schedule.weight,
        }
        assert expected.keys() == functions.keys()
        for name, function in functions.items():
            torch.testing.assert_close(
                function(t),
                wide(expected[name]),
                rtol=1e-6,
                atol=1e-9,
                msg=lambda m, where=(case["schedule"], name): f"{where}: {m}",
            )


def importance_config(schedule: NoiseSchedule) -> TimeConfig:
    """The range of t that upstream's importance transform covers.

    Upstream starts log-linear from σ_min = ε, not from σ(0) = 0 where log p is −∞; linear starts from σ(0) itself. So
    the mask probability starts at 1 − exp(−ε), which our generalisation expresses as t_min.
    """
    t_min = 0.0
    if isinstance(schedule, LogLinear):
        t_min = schedule.time_at(-torch.expm1(wide([-schedule.eps]))).item()
    return TimeConfig(density="importance", t_min=t_min)


def test_importance_sampling_equals_upstreams_transformation(golden: dict[str, list[dict]]) -> None:
    for case in golden["importance_sampling"]:
        schedule = build_schedule(case)
        t, weight = time_and_weight(wide(case["u"]), schedule, importance_config(schedule))
        torch.testing.assert_close(t, wide(case["t"]), rtol=1e-3, atol=5e-6)
        assert len(weight.unique()) == 1  # what the transform is for


def test_time_sampling_equals_upstream(golden: dict[str, list[dict]]) -> None:
    for case in golden["time_sampling"]:
        u, eps = wide(case["uniforms"]), case["sampling_eps"]
        if case["antithetic"]:
            u = stratify(u, torch.arange(len(u)), len(u))
        schedule = LogLinear()
        if case["importance_sampling"]:
            # Upstream stretches u first and transforms the result.
            t, _ = time_and_weight((1 - eps) * u + eps, schedule, importance_config(schedule))
            rtol = 1e-3
        else:
            t, _ = time_and_weight(u, schedule, TimeConfig(t_min=eps))
            rtol = 1e-5
        torch.testing.assert_close(t, wide(case["t"]), rtol=rtol, atol=1e-6)


def test_subs_equals_upstream(golden: dict[str, list[dict]]) -> None:
    for case in golden["subs"]:
        log_probs = subs_log_probs(wide(case["logits"]), torch.tensor(case["xt"]), case["mask_index"])
        torch.testing.assert_close(log_probs, with_minus_infinity(case["log_probs"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["continuous_loss", "discrete_loss"])
def test_bounds_equal_upstream(golden: dict[str, list[dict]], kind: str) -> None:
    for case in golden[kind]:
        schedule, t = build_schedule(case), wide(case["t"])
        clean, tokens, logits = torch.tensor(case["x0"]), torch.tensor(case["xt"]), wide(case["logits"])
        attended = torch.tensor(case["attention_mask"]).bool()
        mask_prob = schedule.mask_prob(t)
        torch.testing.assert_close(mask_prob, wide(case["move_chance"]), rtol=1e-4, atol=1e-6)
        if kind == "discrete_loss":
            levels, weight = time_and_weight(wide(case["t_raw"]), schedule, TimeConfig(levels=case["T"]))
            torch.testing.assert_close(levels, t, rtol=1e-5, atol=1e-6)
            weight *= schedule.mass(0, 1)  # ours average to 1 over all of t
        else:
            weight = schedule.weight(t)
        masked = tokens == case["mask_index"]
        nats = token_cross_entropy(logits[masked], clean[masked], excluded_id=case["mask_index"])
        per_token = torch.zeros(clean.shape, dtype=torch.float64)
        per_token[masked] = nats * weight[masked.nonzero()[:, 0]]
        torch.testing.assert_close(per_token, wide(case["token_loss"]), rtol=2e-4, atol=1e-5)
        loss = masked_diffusion_loss(
            logits,
            clean,
            NoisyBatch(tokens, masked & attended, mask_prob, weight),
            normalizer=float(attended.sum()),
            subs_mask_id=case["mask_index"],
        )
        assert loss.item() == pytest.approx(case["loss"], rel=2e-4, abs=1e-5)


def test_reverse_update_equals_upstream(golden: dict[str, list[dict]]) -> None:
    for case in golden["reverse_update"]:
        # "ddpm_cache" takes t itself for the masking probability, which is log-linear noise with ε = 0.
        schedule = LogLinear(eps=0.0) if case["update"] == "ddpm_cache" else build_schedule(case)
        t, s = case["t"], case["t"] - case["dt"]
        chance = schedule.mask_prob(wide([t, s]))
        torch.testing.assert_close(chance[0].expand(2), wide(case["move_chance_t"]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(chance[1].expand(2), wide(case["move_chance_s"]), rtol=1e-5, atol=1e-6)
        p_x0 = subs_log_probs(wide(case["logits"]), torch.tensor(case["xt"]), case["mask_index"]).exp()
        torch.testing.assert_close(p_x0, wide(case["p_x0"]), rtol=1e-5, atol=1e-6)
        unmask = unmask_probability(schedule, *wide([t, s]))
        weights = unmask * p_x0
        weights[..., case["mask_index"]] = 1 - unmask
        torch.testing.assert_close(weights, wide(case["q_xs"]) / chance[0], rtol=1e-5, atol=1e-6)
