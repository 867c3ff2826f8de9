"""Rotary positions: what they are, and how each way of stretching them over a longer context changes their frequencies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from llada.errors import UserError
from llada.model.rotary import RopeScaling, frequencies, rotary_table, rotate

# As Llama 3.2 (1B) has it.
LLAMA3: dict[str, Any] = {
    "kind": "llama3",
    "factor": 32.0,
    "original_length": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN: dict[str, Any] = {"kind": "yarn", "factor": 4.0, "original_length": 32768}


def test_rotary_scores_depend_on_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, generator=generator)
    cos, sin = rotary_table(torch.arange(12), 8, 100.0)
    q_at = rotate(q.expand(12, 8), cos, sin)
    k_at = rotate(k.expand(12, 8), cos, sin)
    scores = q_at @ k_at.T
    for distance in range(-5, 6):
        torch.testing.assert_close(
            scores.diagonal(distance), scores.diagonal(distance)[:1].expand(12 - abs(distance))
        )
    assert (scores[0, 1:] - scores[0, 0]).abs().min() > 1e-3  # and they do depend on it
    torch.testing.assert_close(q_at.norm(dim=-1), q.norm().expand(12))


def test_linear_is_a_position_between() -> None:
    stretched = rotary_table(torch.arange(0, 24, 4), 16, 1e4, RopeScaling("linear", factor=4.0))
    plain = rotary_table(torch.arange(6), 16, 1e4)
    torch.testing.assert_close(stretched, plain)


def test_llama3_keeps_what_turns_often_and_slows_what_has_not_turned() -> None:
    plain, stretched = frequencies(64, 5e5), frequencies(64, 5e5, RopeScaling(**LLAMA3))
    turns = 8192 * plain / (2 * math.pi)
    assert torch.equal(stretched[turns >= 4], plain[turns >= 4])
    assert torch.equal(stretched[turns <= 1], plain[turns <= 1] / 32)
    between = (turns > 1) & (turns < 4)
    kept = (turns[between] - 1) / 3
    torch.testing.assert_close(stretched[between], plain[between] * (kept + (1 - kept) / 32))
    assert [int(part.sum()) for part in (turns >= 4, between, turns <= 1)] == [15, 3, 14]


def test_yarn_keeps_the_fast_pairs_and_raises_the_scores() -> None:
    scaling = RopeScaling(**YARN)
    ratio = frequencies(128, 1e6) / frequencies(128, 1e6, scaling)
    # 64 · ln(32768 / 2π · turns) / ln(10⁶): pair 23.6 turns 32 times, pair 39.6 once.
    assert ratio[:24].tolist() == [1.0] * 24
    assert ratio[40:].tolist() == pytest.approx([4.0] * 24)
    assert ((ratio[24:40] > 1) & (ratio[24:40] < 4) & (ratio[24:40].diff(prepend=ratio[23:24]) > 0)).all()
    cos, sin = rotary_table(torch.arange(3), 128, 1e6, scaling)
    torch.testing.assert_close(
        cos.square() + sin.square(), torch.full((3, 128), (0.1 * math.log(4) + 1) ** 2)
    )
    own = RopeScaling(**YARN, attention_factor=1.5)
    assert rotary_table(torch.zeros(1), 128, 1e6, own)[0].unique().tolist() == [1.5]


@pytest.mark.parametrize(
    ("scaling", "theirs"),
    [
        ({"kind": "linear", "factor": 2.5}, {"factor": 2.5}),
        (
            LLAMA3,
            {
                "factor": 32.0,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        ),
        (YARN, {"factor": 4.0, "original_max_position_embeddings": 32768}),
        (
            {**YARN, "beta_fast": 10.0, "beta_slow": 2, "attention_factor": 0.7},
            {
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "beta_fast": 10.0,
                "beta_slow": 2,
                "attention_factor": 0.7,
            },
        ),
        # Everything has turned less than once: the two ends of yarn's range fall together, or out of it.
        ({**YARN, "original_length": 7}, {"factor": 4.0, "original_max_position_embeddings": 7}),
        ({**YARN, "original_length": 1}, {"factor": 4.0, "original_max_position_embeddings": 1}),
    ],
    ids=lambda value: value.get("kind", ""),
)
def test_frequencies_are_those_of_transformers(scaling: dict[str, Any], theirs: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": scaling["kind"], "rope_theta": 5e5, **theirs}
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=131072, rope_parameters=parameters
    )
    expected, amplitude = ROPE_INIT_FUNCTIONS[scaling["kind"]](config, torch.device("cpu"))
    ours = RopeScaling(**scaling)
    torch.testing.assert_close(frequencies(128, 5e5, ours), expected, rtol=1e-6, atol=0)
    assert ours.amplitude == pytest.approx(amplitude, rel=1e-12)


def test_tables_are_float32_in_a_half_precision_network() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cos, sin = rotary_table(torch.arange(9000), 64, 5e5, RopeScaling(**LLAMA3))
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos, rotary_table(torch.arange(9000), 64, 5e5, RopeScaling(**LLAMA3))[0])


def test_content_is_what_is_set() -> None:
    assert RopeScaling().content() == {}
    assert RopeScaling(**LLAMA3).content() == LLAMA3
    assert RopeScaling(**YARN).content() == YARN


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "dynamic", "factor": 2.0}, "kind must be one of none, linear, llama3, yarn, not 'dynamic'"),
        ({"factor": 2.0}, "factor is not of kind none: leave it out"),
        ({"kind": "linear"}, "kind linear needs factor"),
        ({"kind": "linear", "factor": 0.5}, "factor must be at least 1"),
        ({"kind": "linear", "factor": 2.0, "original_length": 8}, "original_length is not of kind linear"),
        ({**LLAMA3, "beta_fast": 3.0}, "beta_fast is not of kind llama3"),
        ({**LLAMA3, "low_freq_factor": None}, "kind llama3 needs low_freq_factor"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor 4.0 must be below high_freq_factor 4.0"),
        ({**LLAMA3, "factor": "8"}, "factor must be float or null, not '8'"),
        ({**YARN, "beta_fast": 1}, "beta_fast 1 must be above beta_slow 1.0"),
        ({**YARN, "original_length": 8.5}, "original_length must be int or null"),
    ],
    ids=str,
)
def test_settings_that_say_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"model.rope_scaling: {message}"):
        RopeScaling(**settings)
