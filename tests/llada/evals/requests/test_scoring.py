"""Scores of continuations: against exact tables and the estimators of one pair, and the same in any company."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llada.diffusion.chain import chain_log_probs
from llada.diffusion.likelihood import answer_nats
from llada.errors import UserError
from llada.evals.requests.scoring import Pair, Score, ScoreConfig, num_forwards, score_pairs
from llada.model.transformer import ModelConfig, Transformer

RULES = ("monte_carlo", "left_to_right", "confidence")
MASK = 8


def network_of(**changes: Any) -> Transformer:
    shape = {"vocab_size": 9, "d_model": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24, "max_length": 16}
    network = Transformer(ModelConfig(**shape, mask_token_id=MASK, **changes))
    network.init_weights(5)
    return network.double().eval()


def pairs_of(number: int) -> list[Pair]:
    generator = torch.Generator().manual_seed(number)

    def draw(high: int) -> list[int]:
        length = int(torch.randint(high, (), generator=generator))
        return torch.randint(8, (length,), generator=generator).tolist()

    return [Pair(draw(6), draw(7)) for _ in range(number)]


def exact_bound(network: Transformer, pair: Pair, cfg_scale: float = 0.0) -> float:
    """Every mask enumerated."""
    row = torch.tensor([[*pair.context, *pair.continuation]])
    answer = torch.arange(row.shape[1])[None] >= len(pair.context)
    T, total = len(pair.continuation), 0.0
    for bits in itertools.product((False, True), repeat=T):
        if any(bits):
            masked = torch.tensor([[*[False] * len(pair.context), *bits]])
            noisy = torch.where(masked, MASK, row)
            nats = answer_nats(network, noisy, row, answer, mask_id=MASK, cfg_scale=cfg_scale)
            total -= float(nats) / (T * math.comb(T, sum(bits)))
    return total


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_the_sampled_score_is_the_bound(cfg_scale: float) -> None:
    """With many masks, and on average with few."""
    network, pair = network_of(), Pair([1, 2], [3, 0, 7])
    exact = exact_bound(network, pair, cfg_scale)
    config = ScoreConfig(num_samples=2000, cfg_scale=cfg_scale, max_tokens=2000)
    assert score_pairs(network, [pair], config)[0].log_p == pytest.approx(exact, rel=0.015)
    few = [
        score_pairs(network, [pair], replace(config, num_samples=2, seed=seed))[0].log_p
        for seed in range(100)
    ]
    spread = torch.tensor(few).std().item() / 100**0.5
    assert abs(sum(few) / 100 - exact) < 4 * spread
    assert spread < 0.05 * abs(exact)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block", [None, 2])
def test_a_score_is_the_same_in_any_company(rule: Any, block: int | None) -> None:
    network, pairs = network_of(block_length=block), pairs_of(12)
    config = ScoreConfig(rule=rule, num_samples=5, cfg_scale=0.5, max_tokens=40)
    together = score_pairs(network, pairs, config)
    alone = [score_pairs(network, [pair], replace(config, max_tokens=1))[0] for pair in pairs]
    assert [score.log_p for score in together] == pytest.approx([score.log_p for score in alone], rel=1e-9)
    assert [score.is_greedy for score in together] == [score.is_greedy for score in alone]
    assert all(
        (score.log_p == 0) == (not pair.continuation) for score, pair in zip(together, pairs, strict=True)
    )


def test_the_rules_agree_on_one_token_and_are_the_chain_on_more() -> None:
    network, short, long = network_of(), Pair([4, 2], [1]), Pair([4, 2], [1, 0, 5])
    scores = {rule: score_pairs(network, [short, long], ScoreConfig(rule=rule)) for rule in RULES}
    assert len({round(score[0].log_p, 9) for score in scores.values()}) == 1
    row, scored = torch.tensor([[4, 2, 1, 0, 5]]), torch.tensor([[False, False, True, True, True]])
    for order in ("left_to_right", "confidence"):
        expected = float(chain_log_probs(network, row, scored, order=order).sum())
        assert scores[order][1].log_p == pytest.approx(expected, rel=1e-9)


def test_the_choices_of_a_question_share_their_masks() -> None:
    """They differ in the last token, which no network of one-hot beliefs looks at: so do not their scores before it."""
    seen: list[tuple[bool, ...]] = []

    class Watched(Transformer):
        def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
            seen.extend(tuple(row) for row in (input_ids == MASK).tolist())
            return super().forward(input_ids, **inputs)

    network = Watched(network_of().config)
    network.init_weights(0)
    choices = [
        Pair([1, 2], [3, 4, 5]),
        Pair([1, 2], [6, 7, 0]),
        Pair([1], [6, 7, 0]),
        Pair([1], [6, 7, 0], [1, 2]),
    ]
    masks = []
    for choice in choices:
        seen.clear()
        score_pairs(network, [choice], ScoreConfig(num_samples=8))
        masks.append(seen[:8])
    assert masks[0] == masks[1]
    assert [mask[2:] for mask in masks[0]] != [mask[1:] for mask in masks[2]]  # of another question, others
    assert [mask[2:] for mask in masks[0]] == [mask[1:] for mask in masks[3]]  # unless it takes them
    assert len(set(masks[0])) > 3


def test_greedy_is_what_the_network_would_write() -> None:
    network = network_of()
    context = [3, 1]
    canvas = torch.tensor([[*context, *[MASK] * 4]])
    for _ in range(4):
        log_p = network(canvas)[0, :, :MASK].log_softmax(-1)
        log_p[canvas[0] != MASK] = -math.inf
        place = int(log_p.max(1).values.argmax())
        canvas[0, place] = int(log_p[place].argmax())
    written = canvas[0, 2:].tolist()
    others = [[*written[:k], (written[k] + 1) % 8, *written[k + 1 :]] for k in range(4)]
    scores = score_pairs(
        network, [Pair(context, text) for text in (written, *others)], ScoreConfig(rule="left_to_right")
    )
    assert [score.is_greedy for score in scores] == [True, False, False, False, False]


def test_nothing_to_score_is_certain() -> None:
    assert score_pairs(network_of(), [Pair([1], []), Pair([], [])]) == [Score(0.0, True)] * 2
    assert score_pairs(network_of(), []) == []


def test_what_cannot_be_scored_is_refused() -> None:
    for pair, message in (
        (Pair([1], [MASK, 2]), "holds the mask token 8"),
        (Pair([9], [2]), "token id 9"),
        (Pair([1] * 10, [2] * 7), "17 tokens exceeds"),
    ):
        with pytest.raises(UserError, match=message):
            score_pairs(network_of(), [Pair([1], [2]), pair])
    with pytest.raises(UserError, match="num_samples"):
        ScoreConfig(num_samples=0)
    network = network_of()
    with torch.no_grad():
        network.lm_head.weight[3] = math.nan
    with pytest.raises(FloatingPointError):
        score_pairs(network, [Pair([1], [2, 3])])


def test_an_autoregressive_network_is_scored_exactly() -> None:
    network = network_of(causal=True)
    pairs = [Pair([1, *pair.context], pair.continuation) for pair in pairs_of(12)]
    likeliest = int(network(torch.tensor([[1, 2]]))[0, -1].argmax())
    pairs.append(Pair([1, 2], [likeliest]))
    for config in (ScoreConfig(), ScoreConfig("confidence", max_tokens=3)):
        scores = score_pairs(network, pairs, config)
        for pair, score in zip(pairs, scores, strict=True):
            row = torch.tensor([[*pair.context, *pair.continuation]])
            logits = network(row)[0, len(pair.context) - 1 : -1].detach()
            target = torch.tensor(pair.continuation, dtype=torch.int64)
            expected = float(logits.log_softmax(-1).gather(1, target[:, None]).sum())
            assert score.log_p == pytest.approx(expected, abs=1e-9)
            assert score.is_greedy == bool((logits.argmax(-1) == target).all())
        assert scores[-1].is_greedy
        assert [num_forwards(network, pair, config) for pair in pairs] == [
            int(len(pair.continuation) > 0) for pair in pairs
        ]
    with pytest.raises(UserError, match=r"cfg_scale=0\.5 masks the context"):
        score_pairs(network, pairs, ScoreConfig(cfg_scale=0.5))
    with pytest.raises(UserError, match="scores no first token"):
        score_pairs(network, [Pair([], [1])])
