"""What is computed over the vocabulary, against float64 and against the distributions that should come out."""

import itertools

import pytest
import torch
from torch import Tensor

from llada.diffusion.noise import row_keys
from llada.sampling import draw
from llada.sampling.draw import Cut, certainty, confidence, draw_tokens, likeliest_tokens, two_likeliest

WORDS = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05], dtype=torch.float64)


def random_logits(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Flat, peaked, near certain and near impossible distributions over 50 ids, some of which are ruled out."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, 50, generator=generator, dtype=torch.float64)
    logits *= torch.tensor([0.0, 1.0, 4.0, 12.0], dtype=torch.float64).repeat(15)[:, None]
    logits[::3, 7] = 45.0
    logits[::5, 11] = -60.0
    logits[1::4, 20:30] = -torch.inf
    return logits.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_confidence_is_the_softmax_near_0_and_near_1(dtype: torch.dtype) -> None:
    logits = random_logits(dtype=dtype)
    wide = logits.double()
    rows = torch.arange(len(logits))
    for tokens in (wide.argmax(1), wide.argmin(1), torch.full_like(rows, 7), torch.full_like(rows, 25)):
        got = confidence(logits, tokens)
        assert got.dtype == torch.float64
        expected = wide.softmax(1)[rows, tokens]
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(got, expected, atol=0, rtol=tolerance)
        # What is missing to 1, where float32 would call it 1.
        others = wide.scatter(1, tokens[:, None], -torch.inf)
        missing = (others.logsumexp(1) - wide.logsumexp(1)).exp()
        near_one = (missing < 1e-6) & (missing > 1e-14)
        if near_one.any():
            torch.testing.assert_close((1 - got)[near_one], missing[near_one], atol=1e-15, rtol=1e-6)


def test_certainty_is_minus_the_entropy() -> None:
    logits = random_logits()
    expected = -torch.special.entr(logits.softmax(1)).sum(1)
    torch.testing.assert_close(certainty(logits), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(certainty(logits.float()), expected, atol=1e-5, rtol=1e-5)
    assert (certainty(torch.tensor([[3.0, -torch.inf, -torch.inf]])) == 0).all()


def test_the_two_likeliest() -> None:
    logits = random_logits()
    expected = logits.softmax(1).topk(2).values
    torch.testing.assert_close(two_likeliest(logits), expected, atol=0, rtol=1e-12)
    one = torch.tensor([[2.0, -torch.inf, -torch.inf]])
    assert two_likeliest(one).tolist() == [[1.0, 0.0]]
    assert two_likeliest(one, torch.tensor([[0]])).tolist() == [[0.0, 0.0]]


def test_impossible_ids_do_not_count() -> None:
    logits = random_logits()
    ids = torch.randint(0, 50, (len(logits), 3), generator=torch.Generator().manual_seed(1))
    without = logits.scatter(1, ids, -torch.inf)
    for tokens in (without.argmax(1), torch.full((len(logits),), 3)):
        assert torch.equal(confidence(logits, tokens, ids), confidence(without, tokens))
    assert (confidence(logits, ids[:, 0], ids) == 0).all()
    assert torch.equal(two_likeliest(logits, ids), two_likeliest(without))


def test_slices_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(dtype=torch.float32)
    count = len(logits)
    keys, heat = torch.arange(count), torch.tensor([0.0, 0.7, 1.5], dtype=torch.float64).repeat(20)
    cut = Cut(
        torch.arange(count) % 5, torch.linspace(0, 1, count, dtype=torch.float64), torch.full((count,), 0.01)
    )
    uniform = torch.linspace(0, 0.99, count, dtype=torch.float64).masked_fill(keys % 2 == 0, torch.nan)
    ids = torch.full((count, 1), 7)

    def everything() -> list[Tensor]:
        tokens = draw_tokens(logits, heat, keys, 1e-6, cut=cut, uniform=uniform)
        return [tokens, confidence(logits, tokens, ids), certainty(logits), two_likeliest(logits, ids)]

    whole = everything()
    for size in (1, 50, 170):
        monkeypatch.setattr(draw, "_SLICE", size)
        for got, expected in zip(everything(), whole, strict=True):
            assert torch.equal(got, expected)


def frequencies(logits: Tensor, temperature: float = 1.0, rows: int = 20_000, **limits: float) -> Tensor:
    """How often each id is drawn, (V,)."""
    cut = Cut(
        torch.full((rows,), int(limits.get("top_k", 0))),
        torch.full((rows,), limits.get("top_p", 1.0), dtype=torch.float64),
        torch.full((rows,), limits.get("min_p", 0.0), dtype=torch.float64),
    )
    uniform = None
    if limits.get("summed"):
        uniform = torch.rand(rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = draw_tokens(
        logits.expand(rows, -1), temperature, torch.arange(rows), 1e-6, cut=cut, uniform=uniform
    )
    return torch.bincount(tokens, minlength=len(logits)).double() / rows


def check(got: Tensor, expected: Tensor, rows: int = 20_000) -> None:
    """Chi-square of the ids that may come, one in a thousand at 4 degrees of freedom; none of the others."""
    assert (got[expected == 0] == 0).all()
    kept = expected > 0
    assert float(((got - expected)[kept] ** 2 / expected[kept]).sum()) * rows < 18.5


def cut_by_hand(probs: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    ranked = sorted(range(len(probs)), key=lambda i: -float(probs[i]))
    kept, total = [], 0.0
    for place, i in enumerate(ranked):
        p = float(probs[i])
        if place and ((top_k and place >= top_k) or total >= top_p - 1e-9 or p < min_p * float(probs.max())):
            break
        kept.append(i)
        total += p
    out = torch.zeros_like(probs)
    out[kept] = probs[kept]
    return out / out.sum()


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 5},
        {"top_k": 99},  # more than there are
        {"top_p": 0.0},
        {"top_p": 1e-12},
        {"top_p": 0.4},
        {"top_p": 0.66},
        {"top_p": 0.96},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"top_k": 4, "top_p": 0.8, "min_p": 0.05},
        {"top_k": 2, "top_p": 0.9},
        {"top_p": 0.9, "min_p": 0.55},
    ],
    ids=str,
)
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 1, 4, 0, 2]], ids=["sorted", "mixed"])
def test_a_cut_draws_from_the_rest_as_before(limits: dict, order: list[int], summed: bool) -> None:
    probs = WORDS[order]
    for temperature in (1.0, 0.5):
        heated = probs ** (1 / temperature)
        expected = cut_by_hand(heated / heated.sum(), **limits)
        check(frequencies(probs.log() + 3, temperature, summed=summed, **limits), expected)


def test_what_is_as_likely_as_the_last_one_is_kept() -> None:
    """Whatever order a sort would have put equals in, and however rounding has moved them."""
    probs = torch.tensor([0.2, 0.3, 0.2, 0.1, 0.2], dtype=torch.float64)
    nudged = probs.log() + torch.tensor([1e-8, 0, -1e-8, 0, 0], dtype=torch.float64)
    for limits in ({"top_k": 2}, {"top_k": 4}, {"top_p": 0.5}, {"top_p": 0.69}, {"min_p": 2 / 3}):
        expected = torch.tensor([2, 3, 2, 0, 2], dtype=torch.float64) / 9
        check(frequencies(nudged, **limits), expected)


def test_ids_that_are_ruled_out_stay_so_under_any_cut() -> None:
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 0.5, -torch.inf], dtype=torch.float64)
    expected = logits.softmax(0)
    for limits in ({"top_k": 4}, {"top_k": 5}, {"top_p": 0.999}, {"min_p": 0.0}, {"summed": True}):
        check(frequencies(logits, **limits), expected)


def test_a_cut_means_nothing_to_a_greedy_row_nor_one_row_to_another() -> None:
    logits = torch.stack([WORDS.log()] * 4000)
    heat = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(2000)
    cut = Cut(
        torch.tensor([0, 0, 0, 2]).repeat(1000),
        torch.ones(4000, dtype=torch.float64),
        torch.zeros(4000, dtype=torch.float64),
    )
    keys = torch.arange(4000)
    tokens = draw_tokens(logits, heat, keys, cut=cut)
    assert (tokens[::2] == 0).all()
    assert torch.equal(tokens[1::4], draw_tokens(logits, heat, keys)[1::4])
    assert int(tokens[1::4].max()) == 4
    assert set(tokens[3::4].tolist()) == {0, 1}


def test_a_summed_draw_is_the_inverse_of_the_distribution() -> None:
    logits = WORDS.log().expand(100, -1)
    uniform = torch.linspace(0, 0.995, 100, dtype=torch.float64)
    tokens = draw_tokens(logits, 1.0, torch.zeros(100).long(), uniform=uniform)
    edges = WORDS.cumsum(0)
    for u, token in zip(uniform.tolist(), tokens.tolist(), strict=True):
        assert token == next(i for i in range(5) if u < float(edges[i]) - 1e-14 or i == 4)
    # A uniform that rounds to the whole: still an id that is possible.
    last = torch.full((3,), 1 - 2.0**-53, dtype=torch.float64)
    ruled_out = torch.tensor([0.1, 0.3, 0.2, -torch.inf]).expand(3, -1)
    assert draw_tokens(ruled_out, 1.0, torch.zeros(3).long(), uniform=last).tolist() == [2, 2, 2]


def test_gumbel_noise_does_not_truncate_the_tail() -> None:
    """A word of one in a thousand comes as often as it should, with noise of 53 bits."""
    logits = torch.tensor([0.999, 0.001], dtype=torch.float32).log()
    rare = float(frequencies(logits, rows=200_000)[1]) * 200_000
    assert abs(rare - 200) < 4 * 200**0.5


def test_no_copy_of_the_logits_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy rows make none at all, drawn ones are worked on a slice at a time."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Widest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float64:
                self.size = max(self.size, out.numel())
            return out

    monkeypatch.setattr(draw, "_SLICE", 2000)
    logits = torch.randn(40, 1000, generator=torch.Generator().manual_seed(0))
    cut = Cut(torch.full((40,), 5), torch.full((40,), 0.9).double(), torch.full((40,), 0.1).double())
    for heat, most in ((0.0, 200), (1.0, 2000)):
        with Widest() as widest:
            tokens = draw_tokens(logits, heat, torch.arange(40), cut=cut)
            confidence(logits, tokens)
            certainty(logits)
            two_likeliest(logits)
        assert widest.size <= most


def test_equals_are_told_by_their_ids() -> None:
    for values in itertools.permutations([1.0, 1.0 + 1e-7, 1.0 - 1e-7]):
        logits = torch.tensor([[0.0, *values]], dtype=torch.float64)
        assert draw_tokens(logits, 0.0, torch.zeros(1).long(), 1e-6).tolist() == [1]


def test_drawn_tokens_are_samples_of_the_softmax() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, float("-inf")], dtype=torch.float64)
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits / temperature).softmax(-1)[:4] * 20_000
        drawn = draw_tokens(logits.expand(20_000, 5), temperature, row_keys(7, torch.arange(20_000)))
        counts = torch.bincount(drawn, minlength=5)
        assert counts[4] == 0
        statistic = float(((counts[:4] - expected) ** 2 / expected).sum())
        assert statistic < 16.3  # chi-square, 3 degrees of freedom: one in a thousand
    assert draw_tokens(logits[None], 0.0, torch.zeros(1).long()).tolist() == [0]


@pytest.mark.parametrize("slice_size", [1 << 23, 7])
def test_the_likeliest_tokens(slice_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "_SLICE", slice_size)
    logits = random_logits()
    expected, which = logits.log_softmax(1).topk(6)
    ids, log_probs = likeliest_tokens(logits.clone(), 6)
    assert torch.allclose(log_probs, expected)
    sure = expected.diff(dim=1).abs().amin(1) > 1e-9  # of equals any may come first
    assert sure.any()
    assert torch.equal(ids[sure], which[sure])
    assert likeliest_tokens(logits, 99)[0].shape == (60, 50)
