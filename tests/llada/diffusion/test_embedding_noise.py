"""Noise on embeddings: a function of keys, at the positions that are named, and of the size that the step gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llada.diffusion import embedding_noise
from llada.diffusion.embedding_noise import EmbeddingNoiseConfig, add_noise_at
from llada.errors import UserError


def test_the_noise_falls_evenly_to_none() -> None:
    config = EmbeddingNoiseConfig(std=0.2, steps=4)
    assert [config.std_at(step) for step in range(6)] == pytest.approx([0.2, 0.15, 0.1, 0.05, 0, 0])
    assert [EmbeddingNoiseConfig().std_at(step) for step in (0, 9)] == [0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"std": 0.1}, "std 0.1 and steps 0 are nothing without each other"),
        ({"steps": 3}, "std 0.0 and steps 3 are nothing without each other"),
        ({"std": -0.1, "steps": 3}, "std must be at least 0"),
        ({"std": float("nan"), "steps": 3}, "std must be a finite number"),
    ],
)
def test_half_a_setting_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"objective.embedding_noise: {message}"):
        EmbeddingNoiseConfig(**settings)


def added(positions: list[int], keys: list[int], std: list[float], shape: tuple[int, ...]) -> Tensor:
    """What is added to zeros of this shape, whose rows have 6 columns of their own."""
    noise = (torch.tensor(positions), torch.tensor(keys), torch.tensor(std))
    return add_noise_at(torch.zeros(shape), *noise, length=6)


def test_positions_are_of_the_first_columns_and_numbers_of_the_keys() -> None:
    plain = added([1, 6, 11, 0, 0], [7, 8, 9, 5, 5], [1.0, 2.0, 0.5, 0.0, 0.0], (2, 6, 64))
    assert plain.any(-1).nonzero().tolist() == [[0, 1], [1, 0], [1, 5]]
    with_context = added([1, 6, 11], [7, 8, 9], [1.0, 2.0, 0.5], (2, 12, 64))
    assert torch.equal(with_context[:, :6], plain)
    assert not with_context[:, 6:].any()
    elsewhere = added([3, 4], [9, 8], [0.5, 2.0], (1, 6, 64))
    assert torch.equal(elsewhere[0, 3], plain[1, 5])
    assert torch.equal(elsewhere[0, 4], plain[1, 0])


def test_the_numbers_are_independent_and_normal() -> None:
    n = 4000
    x = add_noise_at(torch.ones(1, n, 16), torch.arange(n), torch.arange(n), torch.full((n,), 0.3), length=n)
    noise = (x - 1)[0].double() / 0.3
    cut = 0.9866  # the standard deviation of what is cut at ±3
    assert noise.abs().max() < 3 + 1e-6
    assert noise.std().item() == pytest.approx(cut, rel=0.01)  # 1/√(2 · 64,000) = 0.3 %
    assert noise.mean().abs() < 4 / (16 * n) ** 0.5
    off_diagonal = torch.corrcoef(noise.T) - torch.eye(16)
    assert off_diagonal.abs().max() < 5 / n**0.5


def test_numbers_that_are_drawn_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ([1, 6, 11], [7, 8, 9], [1.0, 2.0, 0.5], (2, 6, 64))
    whole = added(*arguments)
    monkeypatch.setattr(embedding_noise, "_CHUNK", 65)
    assert torch.equal(added(*arguments), whole)


def test_gradients_pass_and_the_dtype_stays() -> None:
    x = torch.ones(1, 6, 8, dtype=torch.bfloat16, requires_grad=True)
    noisy = add_noise_at(x, torch.tensor([2]), torch.tensor([3]), torch.tensor([0.5]), length=6)
    assert noisy.dtype == torch.bfloat16
    noisy.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(x, torch.ones_like(x))  # which is not changed in place
