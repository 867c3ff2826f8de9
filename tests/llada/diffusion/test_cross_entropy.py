"""Cross-entropy over the vocabulary in slices: the plain formula and its gradients, without anything (N, V) in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llada.diffusion import cross_entropy
from llada.diffusion.cross_entropy import SLICE, token_cross_entropy, weighted_nats
from llada.model.predict import guide

N, D, V = 11, 6, 7


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return x, weight, torch.arange(N) % (V - 1), torch.rand(N, generator=generator, dtype=torch.float64)


def plainly(x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, excluded_id: int | None) -> Tensor:
    logits = x @ weight.T
    if excluded_id is not None:
        logits = logits.index_fill(1, torch.tensor([excluded_id]), -torch.inf)
    nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return (nats * scale).sum()


@pytest.mark.parametrize("rows", [1, 4, 11, 50])
@pytest.mark.parametrize("excluded_id", [None, V - 1])
def test_slices_add_up_to_the_formula_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch, rows: int, excluded_id: int | None
) -> None:
    monkeypatch.setitem(SLICE, "cpu", rows * V + 3)
    x, weight, targets, scale = inputs()
    expected = plainly(x, weight, targets, scale, excluded_id)
    loss = weighted_nats(x, weight, targets, scale, excluded_id=excluded_id)
    torch.testing.assert_close(loss, expected)
    # Behind the loss may stand a factor: the number of workers.
    got, wanted = (torch.autograd.grad(3 * value, (x, weight)) for value in (loss, expected))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("rows", [1, 4, 50])
def test_the_nats_are_told_by_buckets_and_the_loss_stays(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Without their scale, added to what was there; a bucket beyond the last counts nowhere."""
    monkeypatch.setitem(SLICE, "cpu", rows * V)
    x, weight, targets, scale = inputs()
    buckets = torch.tensor([2, 0, 0, 3, 1, 2, 2, 3, 0, 1, 2])
    tally = torch.tensor([[1.0, 5.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    loss = weighted_nats(x, weight, targets, scale, buckets=buckets, tally=tally)
    assert torch.equal(loss, weighted_nats(x, weight, targets, scale))
    nats = torch.nn.functional.cross_entropy((x @ weight.T).detach(), targets, reduction="none")
    expected = [[float(nats[buckets == k].sum()), int((buckets == k).sum())] for k in range(3)]
    assert tally.tolist() == [pytest.approx(row) for row in [[1 + expected[0][0], 8], *expected[1:]]]
    assert not tally.requires_grad


@pytest.mark.parametrize("wanted", ["x", "weight", "neither"])
def test_only_what_is_wanted_gets_a_gradient(wanted: str) -> None:
    x, weight, targets, scale = inputs()
    x.requires_grad_(wanted == "x")
    weight.requires_grad_(wanted == "weight")
    loss = weighted_nats(x, weight, targets, scale)
    assert loss.requires_grad == (wanted != "neither")
    torch.testing.assert_close(loss, plainly(x, weight, targets, scale, None))
    if wanted != "neither":
        loss.backward()
        assert (x.grad is None, weight.grad is None) == (wanted != "x", wanted != "weight")


def test_a_gradient_can_be_taken_once() -> None:
    x, weight, targets, scale = inputs()
    loss = weighted_nats(x, weight, targets, scale)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_no_position_is_no_loss() -> None:
    x, weight, targets, scale = inputs()
    loss = weighted_nats(x[:0], weight, targets[:0], scale[:0])
    loss.backward()
    assert loss == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_large_and_equal_logits_stay_numbers() -> None:
    x = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    weight = torch.tensor([[9e3], [-9e3], [9e3]], requires_grad=True)
    loss = weighted_nats(x, weight, torch.tensor([0, 0, 1]), torch.ones(3))
    assert loss.item() == pytest.approx(torch.log(torch.tensor(2.0)) + 18e3 + torch.log(torch.tensor(3.0)))
    loss.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_autocast_multiplies_in_its_dtype_and_sums_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the head's own product and a float32 cross-entropy would; the gradient of the weight is added up in float32."""
    monkeypatch.setitem(SLICE, "cpu", 4 * V)
    x, weight, targets, scale = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = weighted_nats(x, weight, targets, scale)
        logits = torch.nn.functional.linear(x, weight).float()
    assert loss.dtype == torch.float32
    expected = (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * scale.float()).sum()
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss, (x, weight))
    assert [grad.dtype for grad in got] == [torch.float32] * 2
    exact = torch.autograd.grad(plainly(x.double(), weight.double(), targets, scale, None), (x, weight))
    for ours, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.03)  # bfloat16 has 8 bits


def test_nothing_is_as_large_as_all_logits(monkeypatch: pytest.MonkeyPatch, largest: Callable) -> None:
    monkeypatch.setitem(SLICE, "cpu", 50 * 400)
    x, weight = torch.randn(1000, 8, requires_grad=True), torch.randn(400, 8, requires_grad=True)
    with largest() as seen:
        weighted_nats(x, weight, torch.arange(1000) % 400, torch.ones(1000)).backward()
    assert seen.numbers <= 50 * 400


def test_cross_entropy_of_logits_in_pieces_equals_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(11, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(11) % 7
    whole = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    monkeypatch.setitem(cross_entropy.SLICE, "cpu", 4 * 7)
    torch.testing.assert_close(token_cross_entropy(logits, targets), whole)
    half = token_cross_entropy(logits.bfloat16(), targets)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, token_cross_entropy(logits.bfloat16().float(), targets))
    assert token_cross_entropy(logits.double(), targets).dtype == torch.float64


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_head_is_given_has_the_cross_entropy_of_its_logits(
    monkeypatch: pytest.MonkeyPatch, largest: Callable, dtype: torch.dtype, cfg_scale: float
) -> None:
    """Bit for bit where all positions are one slice; with more slices as near as products of another shape are."""
    generator = torch.Generator().manual_seed(0)
    copies = 2 if cfg_scale else 1
    x = torch.randn(copies * 60, 16, generator=generator)
    weight, targets = torch.randn(50, 16, generator=generator), torch.arange(60) % 49

    def nats(given: Tensor, weight: Tensor | None) -> Tensor:
        return token_cross_entropy(given, targets, weight, excluded_id=49, cfg_scale=cfg_scale)

    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = torch.nn.functional.linear(x, weight)
        plain = guide(logits, cfg_scale) if cfg_scale else logits
        plain = plain.float().index_fill(1, torch.tensor([49]), -torch.inf)
        expected = torch.nn.functional.cross_entropy(plain, targets, reduction="none")
        assert torch.equal(nats(logits, None), expected)
        assert torch.equal(nats(x, weight), expected)
        monkeypatch.setitem(SLICE, "cpu", 7 * 50)
        with largest() as seen:
            torch.testing.assert_close(nats(x, weight), expected)
    assert seen.numbers <= max(copies * 7 * 50, x.numel()) < 60 * 50
    nothing = token_cross_entropy(x[:0], targets[:0], weight, cfg_scale=cfg_scale)
    assert nothing.shape == (0,)
