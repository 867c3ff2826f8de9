"""Likelihood estimates: exact where they must be, unbiased, with honest errors."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llada.diffusion import cross_entropy
from llada.diffusion.chain import chain_log_probs
from llada.diffusion.likelihood import (
    answer_nats,
    log_likelihood,
    mask_exactly,
    nelbo_rows,
    perplexity_bound,
    stratified_counts,
)
from llada.diffusion.noise import row_keys
from llada.errors import UserError
from llada.model.transformer import ModelConfig, Transformer


def mask_subsets(length: int = 3) -> list[Tensor]:
    return [torch.tensor(bits).bool() for bits in itertools.product((0, 1), repeat=length) if any(bits)]


def exact_bound(toy: Any, network: Any, row: Tensor, answer: Tensor) -> float:
    """The mean over mask counts and masks of Σ −log p · T/l, every mask enumerated."""
    total, length = 0.0, int(answer.sum())
    subsets = [m for m in mask_subsets() if not (m & ~answer).any()]
    for masked in subsets:
        same_size = sum(int(m.sum()) == int(masked.sum()) for m in subsets)
        noisy = torch.where(masked, toy.mask_id, row)[None]
        nats = answer_nats(network, noisy, row[None], answer[None], mask_id=toy.mask_id)
        total += nats.item() / (length * same_size)
    return total


def test_bound_is_tight_for_the_true_conditionals(toy: Any) -> None:
    everything = torch.ones(3).bool()
    for row, p in zip(toy.sequences, toy.joint, strict=True):
        bound = exact_bound(toy, toy.network(), row, everything)
        assert bound == pytest.approx(-p.log().item(), rel=1e-9)


def test_bound_is_above_the_any_order_marginal_of_a_wrong_model(toy: Any) -> None:
    network, gaps = toy.network(0.7), []
    for row in toy.sequences:
        orders = toy.log_p_of_orders(network, row)
        marginal = orders.exp().mean().log().item()
        bound = exact_bound(toy, network, row, torch.ones(3).bool())
        assert bound == pytest.approx(-orders.mean().item(), rel=1e-9)
        gaps.append(bound + marginal)
    assert min(gaps) >= -1e-12
    assert max(gaps) > 0.01  # the model does disagree with itself


@pytest.mark.parametrize("perturbation", [0.0, 0.7])
def test_perplexity_bound_converges_to_the_exact_bound(toy: Any, perturbation: float) -> None:
    network, everything = toy.network(perturbation), torch.ones(3).bool()
    exact = sum(exact_bound(toy, network, row, everything) for row in toy.sequences) / 81
    samples = 400
    got = perplexity_bound(network, toy.sequences, num_samples=samples, mask_id=toy.mask_id)
    # Given the row and the count (stratified), only the choice of positions is random: below 1.5 nats per row here.
    assert got.nats_per_token == pytest.approx(exact, abs=4 * 1.5 / 3 / (27 * samples) ** 0.5)


def test_perplexity_bound_counts_only_what_is_maskable(toy: Any) -> None:
    network = toy.network(0.7)
    maskable = torch.zeros(27, 3).bool()
    maskable[:9, 2] = True  # one token: exact with one sample; the other rows have nothing to score
    got = perplexity_bound(network, toy.sequences, num_samples=1, maskable=maskable, mask_id=toy.mask_id)
    exact = torch.stack(
        [
            -network(torch.tensor([[int(a), int(b), toy.mask_id]]))[0, 2].log_softmax(-1)[c]
            for a, b, c in toy.sequences[:9]
        ]
    )
    assert got.nats_per_token == pytest.approx(exact.mean().item(), rel=1e-9)
    assert got.standard_error == pytest.approx(exact.std().item() / 3, rel=1e-9)
    with pytest.raises(ValueError, match="no token"):
        perplexity_bound(network, toy.sequences, maskable=torch.zeros(27, 3).bool(), mask_id=3)


def test_the_mask_token_gets_no_probability(toy: Any) -> None:
    """Whatever a network says of the mask token, no text holds it: the bound is that of the distribution without it."""
    network = toy.network(0.7)

    def shouting(tokens: Tensor) -> Tensor:
        logits = network(tokens).clone()
        logits[..., toy.mask_id] = 50.0
        return logits

    quiet, loud = (
        perplexity_bound(net, toy.sequences, num_samples=2, mask_id=toy.mask_id)
        for net in (network, shouting)
    )
    assert loud.nats_per_token == pytest.approx(quiet.nats_per_token, rel=1e-9)


def test_perplexity_bound_does_not_depend_on_the_batch_size(toy: Any) -> None:
    network = toy.network(0.7)
    results = [
        perplexity_bound(network, toy.sequences, num_samples=3, mask_id=3, batch_size=size, seed=5)
        for size in (1, 4, 64)
    ]
    for other in results[1:]:
        assert tuple(other) == pytest.approx(tuple(results[0]), rel=1e-12)
    assert results[0] != perplexity_bound(network, toy.sequences, num_samples=3, mask_id=3, seed=6)


def test_standard_error_covers_the_truth(toy: Any) -> None:
    """Texts drawn from the language: the interval of ±1.96 errors holds the expected bound about 95 times of 100."""
    network, everything = toy.network(0.7), torch.ones(3).bool()
    exact = torch.tensor([exact_bound(toy, network, row, everything) for row in toy.sequences])
    truth = float((exact.double() * toy.joint).sum()) / 3
    scores = []
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(toy.joint, 60, replacement=True, generator=generator)
        got = perplexity_bound(network, toy.sequences[drawn], num_samples=1, mask_id=3, seed=seed)
        scores.append((got.nats_per_token - truth) / got.standard_error)
    z = torch.tensor(scores)
    # 150 trials: the share inside has standard deviation 0.018, the spread of z 0.06.
    assert 0.89 <= (z.abs() < 1.96).double().mean().item() <= 0.99
    assert 0.8 < z.std().item() < 1.2
    assert abs(z.mean().item()) < 0.3


def test_standard_error_of_one_row_covers_its_bound(toy: Any) -> None:
    network, row = toy.network(0.7), toy.sequences[14]
    truth = exact_bound(toy, network, row, torch.ones(3).bool()) / 3
    inside = 0
    for seed in range(100):
        got = perplexity_bound(network, row[None], num_samples=12, mask_id=3, seed=seed)
        inside += abs(got.nats_per_token - truth) < 1.96 * got.standard_error
    # The counts are stratified, which the spread of the samples does not know: the error errs on the large side.
    assert inside >= 90
    one = perplexity_bound(network, row[None], num_samples=1, mask_id=3)
    assert math.isnan(one.standard_error)  # one sample of one row says nothing about its error


def test_one_token_answers_are_exact(toy: Any) -> None:
    network = toy.network(0.7)
    for a, b, c in toy.sequences[::5]:
        exact = network(torch.tensor([[a, b, toy.mask_id]]))[0, 2].log_softmax(-1)[c].item()
        for samples in (1, 5):
            got = log_likelihood(network, torch.stack([a, b]), c[None], num_samples=samples, mask_id=3)
            assert got == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("prompt_length", "samples"), [(0, 3), (1, 4), (0, 7), (0, 6)])
def test_log_likelihood_is_unbiased(toy: Any, prompt_length: int, samples: int) -> None:
    """The mean over many draws is the enumerated bound, also where rounding meets .5 (2 tokens, 4 samples)."""
    network, row = toy.network(0.7), toy.sequences[5]
    answer = torch.arange(3) >= prompt_length
    exact = -exact_bound(toy, network, row, answer)
    draws = []
    for seed in range(600):
        generator = torch.Generator().manual_seed(seed)
        draws.append(
            log_likelihood(
                network,
                row[:prompt_length],
                row[prompt_length:],
                num_samples=samples,
                mask_id=3,
                generator=generator,
            )
        )
    values = torch.tensor(draws, dtype=torch.float64)
    error = values.std().item() / len(values) ** 0.5
    assert error < 0.03
    assert values.mean().item() == pytest.approx(exact, abs=3.5 * error)


def test_long_answers_approach_the_exact_value(toy: Any) -> None:
    network, row = toy.network(0.7), toy.sequences[7]
    exact = -exact_bound(toy, network, row, torch.ones(3).bool())
    few = log_likelihood(network, row[:0], row, num_samples=2000, mask_id=3)
    assert few == pytest.approx(exact, abs=0.05)  # standard error 1 / √2000 = 0.02


def test_log_likelihood_needs_an_answer_and_a_mask(toy: Any) -> None:
    with pytest.raises(ValueError, match="empty"):
        log_likelihood(toy.network(), torch.tensor([1]), torch.tensor([]).long(), mask_id=3)
    with pytest.raises(ValueError, match="mask_id"):
        log_likelihood(toy.network(), torch.tensor([1]), torch.tensor([1]))


def test_guided_likelihood_is_the_formula(toy: Any) -> None:
    network, row = toy.network(0.7), torch.tensor([2, 0, 1])
    with_prompt = network(torch.tensor([[2, 0, 3]]))[0, 2, :3]
    without = network(torch.tensor([[3, 3, 3]]))[0, 2, :3]
    expected = (without + 2.5 * (with_prompt - without)).log_softmax(-1)[1].item()

    def finite(tokens: Tensor, **inputs: Tensor) -> Tensor:
        return network(tokens, **inputs).clamp(min=-100)  # −∞ − −∞ at the mask's own logit would be nan

    got = log_likelihood(finite, row[:2], row[2:], cfg_scale=1.5, mask_id=3, num_samples=1)
    assert got == pytest.approx(expected, rel=1e-6)


def test_stratified_counts_cover_every_level() -> None:
    for start in range(1, 6):
        assert sorted(stratified_counts(start, 5, 5).tolist()) == [1, 2, 3, 4, 5]
    assert set(stratified_counts(2, 64, 16).tolist()) == set(range(1, 17))


def test_mask_exactly_masks_so_many_and_the_lowest() -> None:
    maskable = torch.tensor([[True] * 4, [False, True, True, True], [False] * 4])
    uniform = torch.tensor([[0.9, 0.1, 0.5, 0.2]] * 3)
    masked = mask_exactly(maskable, torch.tensor([2, 2, 1]), uniform)
    assert masked.tolist() == [[False, True, False, True], [False, True, False, True], [False] * 4]
    chosen = mask_exactly(torch.ones(50, 9).bool(), torch.arange(50) % 10, torch.rand(50, 9))
    assert chosen.sum(1).tolist() == [n % 10 for n in range(50)]


def test_segments_reach_the_network(toy: Any) -> None:
    seen: list[Tensor] = []

    def network(tokens: Tensor, *, segment_ids: Tensor) -> Tensor:
        seen.append(segment_ids)
        return toy.network()(tokens)

    segments = torch.arange(81).reshape(27, 3)
    perplexity_bound(network, toy.sequences, num_samples=1, segment_ids=segments, mask_id=3, batch_size=20)
    assert torch.equal(torch.cat(seen), segments)
    rows = nelbo_rows(
        toy.network(),
        toy.sequences[:2],
        torch.ones(2, 3).bool(),
        torch.tensor([3, 3]),
        row_keys(0, torch.arange(2)),
        mask_id=3,
    )
    singles = toy.conditionals[3, 3, 3].log()
    expected = [-sum(singles[i, w].item() for i, w in enumerate(row.tolist())) for row in toy.sequences[:2]]
    assert rows.tolist() == pytest.approx(expected)


def uniform(tokens: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*tokens.shape, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": torch.tensor([], dtype=torch.int64)}, "the answer is empty"),
        ({"answer": torch.tensor([])}, "the answer is empty"),
        ({"answer": torch.tensor([1, 4])}, "holds the mask token 4"),
        ({"prompt": torch.tensor([4])}, "holds the mask token 4"),
        ({"num_samples": 0}, "num_samples must be an integer of at least 1, not 0"),
        ({"num_samples": -3}, "num_samples"),
        ({"num_samples": 1.5}, "num_samples"),
        ({"num_samples": True}, "num_samples"),
        ({"batch_size": 0}, "batch_size"),
        ({"cfg_scale": float("nan")}, "cfg_scale"),
        ({"cfg_scale": float("inf")}, "cfg_scale"),
        ({"cfg_scale": -1.0}, "cfg_scale"),
        ({"answer": torch.tensor([-1])}, "the token id -1 lies outside"),
        (
            {"answer": torch.tensor([[1, 2], [2, 3]])},
            r"answer must be a tensor of ids of one row, not .*\(2, 2\)",
        ),
        ({"prompt": torch.tensor([0.5])}, "prompt must be a tensor of ids"),
        ({"prompt": [1, 2]}, "prompt must be a tensor of ids"),
    ],
    ids=str,
)
def test_what_has_no_likelihood_is_refused(changes: dict, message: str) -> None:
    given = {"prompt": torch.tensor([1]), "answer": torch.tensor([2, 3]), "mask_id": 4, **changes}
    with pytest.raises(UserError, match=message) as caught:
        log_likelihood(uniform, given.pop("prompt"), given.pop("answer"), **given)
    assert "\n" not in str(caught.value)


def test_a_perplexity_of_masks_or_of_nothing_is_refused() -> None:
    tokens = torch.tensor([[1, 4, 2]])
    with pytest.raises(UserError, match="holds the mask token 4"):
        perplexity_bound(uniform, tokens, mask_id=4)
    perplexity_bound(uniform, tokens, mask_id=4, maskable=tokens != 4)
    for changes, message in (
        ({"num_samples": 0}, "num_samples"),
        ({"maskable": torch.ones(3, dtype=torch.bool)}, r"maskable must have the shape \(1, 3\)"),
        ({"maskable": torch.zeros(1, 3, dtype=torch.bool)}, "no token to score"),
    ):
        with pytest.raises(UserError, match=message):
            perplexity_bound(uniform, tokens, mask_id=4, **changes)
    for other, message in (
        (tokens[0], r"ids \(B, L\)"),
        (tokens.float(), r"ids \(B, L\)"),
        (tokens.tolist(), r"ids \(B, L\)"),
        (tokens[:0], "no token to score"),
    ):
        with pytest.raises(UserError, match=message):
            perplexity_bound(uniform, other, mask_id=4)


def test_a_likelihood_is_a_number_or_an_error() -> None:
    def broken(tokens: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
        return torch.full((*tokens.shape, 5), float("nan"))

    with pytest.raises(FloatingPointError):
        log_likelihood(broken, torch.tensor([1]), torch.tensor([2]), mask_id=4)
    with pytest.raises(FloatingPointError):
        perplexity_bound(broken, torch.tensor([[1, 2]]), mask_id=4)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_the_bound_of_a_block_causal_network_is_the_sum_of_its_blocks(cfg_scale: float) -> None:
    """Every mask enumerated: those of the whole answer against those of each block alone, behind clean ones."""
    shape = {"vocab_size": 6, "d_model": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24, "max_length": 16}
    network = Transformer(ModelConfig(**shape, mask_token_id=5, block_length=2))
    network.init_weights(3)
    row, P = torch.tensor([2, 4, 0, 1, 1, 3]), 1  # the prompt's end shares the answer's first block
    is_answer = torch.arange(6) >= P
    whole = 0.0
    subsets = [m for m in mask_subsets(6) if not (m & ~is_answer).any()]
    for masked in subsets:
        same_size = math.comb(5, int(masked.sum()))
        noisy = torch.where(masked, 5, row)[None]
        whole += answer_nats(
            network, noisy, row[None], is_answer[None], mask_id=5, cfg_scale=cfg_scale
        ).item() / (5 * same_size)

    def logits_of(tokens: Tensor) -> Tensor:
        hidden = torch.where(torch.arange(len(tokens)) < P, 5, tokens)
        with torch.no_grad():
            conditional, unconditional = network(tokens[None])[0], network(hidden[None])[0]
        return unconditional + (cfg_scale + 1) * (conditional - unconditional)

    by_block, without_mask = 0.0, 0.0
    for begin, end in ((0, 2), (2, 4), (4, 6)):
        own = is_answer & (torch.arange(6) >= begin) & (torch.arange(6) < end)
        n = int(own.sum())
        for masked in [m for m in subsets if not (m & ~own).any()]:
            k = int(masked.sum())
            logits = logits_of(torch.where(masked, 5, row)[:end])[masked[:end]]
            share = n / k / (n * math.comb(n, k))
            by_block -= float(logits.log_softmax(-1).gather(-1, row[masked][:, None]).sum()) * share
            without_mask -= (
                float(logits[:, :5].log_softmax(-1).gather(-1, row[masked][:, None]).sum()) * share
            )
    assert whole == pytest.approx(by_block, rel=1e-5)
    estimate = -log_likelihood(
        network, row[:P], row[P:], num_samples=3000, batch_size=500, cfg_scale=cfg_scale
    )
    assert estimate == pytest.approx(by_block, rel=0.02)
    if cfg_scale == 0:
        bound = perplexity_bound(network, row[None], maskable=is_answer[None], num_samples=1000)
        assert 5 * bound.nats_per_token == pytest.approx(without_mask, rel=0.02)


def test_a_network_of_ours_is_scored_as_its_logits_are_and_never_has_them_all(
    monkeypatch: pytest.MonkeyPatch, largest: Callable
) -> None:
    """Bit for bit in one slice; a function of the same logits is handed them whole."""
    V, L = 300, 24
    network = Transformer(ModelConfig(V, 16, 1, 2, 24, mask_token_id=V - 1)).eval()
    network.init_weights(0)
    tokens = torch.randint(V - 1, (6, L), generator=torch.Generator().manual_seed(0))

    def logits(tokens: Tensor) -> Tensor:
        return network(tokens)

    def figures(model: Any, cfg_scale: float) -> tuple[float, ...]:
        answer = log_likelihood(
            model, tokens[0, :4], tokens[0, 4:], num_samples=6, cfg_scale=cfg_scale, mask_id=V - 1
        )
        return answer, *perplexity_bound(model, tokens, num_samples=2, mask_id=V - 1)

    for cfg_scale in (0.0, 1.5):
        whole = figures(logits, cfg_scale)
        assert figures(network, cfg_scale) == whole
        with monkeypatch.context() as patch:
            patch.setitem(cross_entropy.SLICE, "cpu", 16 * V)
            with largest() as seen:
                assert figures(network, cfg_scale) == pytest.approx(whole, rel=1e-5)
            assert seen.numbers <= 2 * 16 * V
            with largest() as seen:
                figures(logits, cfg_scale)
            assert seen.numbers >= 6 * L * V


@pytest.mark.parametrize("name", ["layers.0.q_proj.weight", "layers.0.k_proj.weight"])
def test_a_damaged_weight_gives_no_likelihood(name: str) -> None:
    """Of the attention, whose scores torch makes zeros of on a CPU: the logits are numbers, and wrong."""
    model = Transformer(ModelConfig(12, 16, 1, 2, 24, mask_token_id=11))
    model.init_weights(0)
    prompt, answer, rows = torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([[1, 2, 3]])
    assert log_likelihood(model, prompt, answer, num_samples=2) < 0
    assert perplexity_bound(model, rows, num_samples=2).nats_per_token > 0
    model.get_parameter(name).data[3, 4] = float("nan")
    with pytest.raises(FloatingPointError, match=f"weight {name} holds NaN"):
        log_likelihood(model, prompt, answer, num_samples=2)
    with pytest.raises(FloatingPointError, match=f"weight {name} holds NaN"):
        perplexity_bound(model, rows, num_samples=2)


def test_an_autoregressive_network_has_no_likelihood_by_masks() -> None:
    network = Transformer(ModelConfig(6, 8, 1, 2, 16, max_length=8, mask_token_id=5, causal=True))
    rows = torch.tensor([[1, 2, 3]])
    for ask in (
        lambda: log_likelihood(network, [1], [2, 3]),
        lambda: perplexity_bound(network, rows),
        lambda: chain_log_probs(network, rows, rows > 0),
    ):
        with pytest.raises(UserError, match=r"autoregressive \(causal\): it restores no masks"):
            ask()
