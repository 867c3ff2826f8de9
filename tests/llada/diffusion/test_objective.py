"""The forward process and the loss: exact on a toy language, and equal where two objectives must be."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llada.diffusion.batch import Batch, MicroBatch
from llada.diffusion.cross_entropy import weighted_nats
from llada.diffusion.embedding_noise import EmbeddingNoiseConfig
from llada.diffusion.objective import (
    NoisyBatch,
    ObjectiveConfig,
    add_noise,
    annealed_lookahead,
    corrupt,
    forward_process,
    masked_diffusion_loss,
    next_token_loss,
    objective_loss,
    predicted_positions,
    predictors,
    spread_over_blocks,
)
from llada.diffusion.schedule import LLaDA, LogLinear
from llada.diffusion.time import TimeConfig, time_and_weight
from llada.errors import UserError
from llada.model.transformer import ModelConfig, ReadOut, Transformer


def mask_subsets() -> list[Tensor]:
    return [torch.tensor(bits).bool() for bits in itertools.product((0, 1), repeat=3)]


def exact_loss(toy: Any, network: Any, row: Tensor, schedule: LLaDA | LogLinear) -> float:
    """E over t and masks of the loss of one row: every mask enumerated, t by Gauss–Legendre (exact: a cubic in t)."""
    nodes, weights = np.polynomial.legendre.leggauss(6)
    t = torch.from_numpy((nodes + 1) / 2)
    share = torch.from_numpy(weights / 2)
    total = 0.0
    for masked in mask_subsets():
        canvas = torch.where(masked, toy.mask_id, row)[None]
        p = schedule.mask_prob(t)
        chance = p ** int(masked.sum()) * (1 - p) ** int((~masked).sum())
        # Probabilities ride on the weights.
        weight = schedule.weight(t) * chance * share
        noisy = NoisyBatch(canvas.expand(6, 3), masked.expand(6, 3), p, weight)
        loss = masked_diffusion_loss(network(noisy.tokens), row.expand(6, 3), noisy, normalizer=1.0)
        total += loss.item()
    return total


@pytest.mark.parametrize("perturbation", [0.0, 0.7])
def test_expected_loss_is_the_mean_over_orders(toy: Any, perturbation: float) -> None:
    network = toy.network(perturbation)
    for row in toy.sequences[::4]:
        bound = -toy.log_p_of_orders(network, row).mean().item()
        for exact in (LLaDA(eps=0.0), LogLinear(eps=0.0)):
            assert exact_loss(toy, network, row, exact) == pytest.approx(bound, rel=1e-9)
        # With LLaDA's ε the interval [0, ε] of mask rates is missing and the rest counts 1/(1 − ε) more: at most 3 ε
        # for three tokens.
        assert exact_loss(toy, network, row, LLaDA()) == pytest.approx(bound, rel=3e-3)
        if perturbation == 0:
            index = int((toy.sequences == row).all(1).nonzero())
            assert bound == pytest.approx(-toy.joint[index].log().item(), rel=1e-9)


def test_llada_equals_mdlm_on_the_straight_line() -> None:
    """At the same mask probability p both divide by p, MDLM's ε included once the weights average to one."""
    u = torch.linspace(0.001, 0.999, 9, dtype=torch.float64)
    llada_t, llada_weight = time_and_weight(u, LLaDA(), TimeConfig())
    p = LLaDA().mask_prob(llada_t)
    mdlm_t = LogLinear().time_at(p)
    mdlm_u = torch.where(mdlm_t < 1, mdlm_t, 1.0)
    _, mdlm_weight = time_and_weight(mdlm_u, LogLinear(), TimeConfig())
    torch.testing.assert_close(mdlm_weight[:-1], llada_weight[:-1])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 9, (9, 16), generator=generator)
    logits = torch.randn(9, 16, 11, generator=generator)
    uniform = torch.rand(9, 16, generator=generator)
    losses = []
    for schedule, t in ((LLaDA(), llada_t), (LogLinear(eps=0.0), p)):
        noisy = forward_process(tokens, t=t, schedule=schedule, mask_id=10, uniform=uniform)
        losses.append(masked_diffusion_loss(logits, tokens, noisy, normalizer=9 * 16))
    torch.testing.assert_close(losses[0], losses[1])


def test_forward_process_masks_below_the_probability_and_only_where_allowed() -> None:
    tokens = torch.arange(8).reshape(2, 4)
    uniform = torch.tensor([[0.1, 0.5, 0.499, 0.9]] * 2)
    maskable = torch.tensor([[True] * 4, [False, True, True, True]])
    noisy = forward_process(
        tokens,
        t=torch.tensor([0.5, 0.91]),
        schedule=LLaDA(0.0),
        maskable=maskable,
        mask_id=99,
        uniform=uniform,
    )
    assert noisy.masked.tolist() == [[True, False, True, False], [False, True, True, True]]
    assert noisy.tokens.tolist() == [[99, 1, 99, 3], [4, 99, 99, 99]]
    torch.testing.assert_close(noisy.mask_prob, torch.tensor([0.5, 0.91]))
    torch.testing.assert_close(noisy.weight, 1 / noisy.mask_prob)
    assert tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]  # untouched


def test_a_generator_reproduces_the_noise() -> None:
    tokens = torch.zeros(4, 50).long()

    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        t = torch.full((4,), 0.5)
        return forward_process(tokens, t=t, schedule="llada", mask_id=1, generator=generator).masked

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    for both in ({}, {"generator": torch.Generator(), "uniform": torch.zeros(4, 50)}):
        with pytest.raises(ValueError, match="exactly one"):
            forward_process(tokens, t=torch.ones(4), schedule="llada", mask_id=1, **both)  # type: ignore[arg-type]


def test_normalizer_divides_the_sum_and_not_the_masked_mean() -> None:
    clean = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    masked = torch.tensor([[True, True, False, False], [False, False, False, True]])
    noisy = NoisyBatch(clean, masked, torch.tensor([0.5, 0.25]), torch.tensor([2.0, 4.0]))
    logits = torch.zeros(2, 4, 4)  # −log p = log 4 everywhere
    log4 = torch.tensor(4.0).log()
    loss = masked_diffusion_loss(logits, clean, noisy, normalizer=8)
    torch.testing.assert_close(loss, (2 + 2 + 4) * log4 / 8)
    per_row = masked_diffusion_loss(logits, clean, noisy, normalizer=torch.tensor([2 * 4.0, 2 * 2.0]))
    torch.testing.assert_close(per_row, (4 / 8 + 4 / 4) * log4)
    scalar = masked_diffusion_loss(logits, clean, noisy, normalizer=torch.tensor(8.0))
    torch.testing.assert_close(scalar, loss)


def test_subs_takes_the_mask_out_of_the_softmax() -> None:
    clean = torch.tensor([[0, 1]])
    noisy = NoisyBatch(clean, torch.ones(1, 2).bool(), torch.ones(1), torch.ones(1))
    logits = torch.tensor([[[0.0, 0.0, 50.0]] * 2])
    subs = masked_diffusion_loss(logits, clean, noisy, normalizer=2, subs_mask_id=2)
    torch.testing.assert_close(subs, torch.tensor(2.0).log())
    assert masked_diffusion_loss(logits, clean, noisy, normalizer=2) > 49
    assert logits[0, 0, 2] == 50  # untouched


def test_nothing_masked_is_a_zero_that_can_be_differentiated() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    clean = torch.zeros(2, 3).long()
    noisy = NoisyBatch(clean, torch.zeros(2, 3).bool(), torch.zeros(2), torch.full((2,), float("inf")))
    loss = masked_diffusion_loss(logits, clean, noisy, normalizer=6)
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_next_token_loss_predicts_from_the_position_before() -> None:
    clean = torch.tensor([[4, 2, 0, 3], [1, 1, 2, 4]])
    predicted = torch.tensor([[False, True, True, False], [False, False, True, True]])
    before = predictors(predicted)
    assert before.tolist() == [[True, True, False, False], [False, True, True, False]]
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    log_p = logits.log_softmax(-1)
    nats = [-log_p[0, 0, 2], -log_p[0, 1, 0], -log_p[1, 1, 2], -log_p[1, 2, 4]]
    loss = next_token_loss(logits[before], clean, predicted, normalizer=4)
    torch.testing.assert_close(loss, sum(nats) / 4)
    by_row = next_token_loss(logits[before], clean, predicted, normalizer=torch.tensor([2.0, 8.0]))
    torch.testing.assert_close(by_row, (nats[0] + nats[1]) / 2 + (nats[2] + nats[3]) / 8)


def test_autoregressive_targets_have_a_predecessor_in_their_document() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, -1]])
    batch = Batch(
        tokens=torch.arange(6)[None],
        segment_ids=segments,
        maskable=torch.tensor([[True] * 5 + [False]]),
        slots=torch.zeros(1).long(),
        epochs=torch.zeros(1).long(),
        sample_ids=torch.zeros(1).long(),
        step=0,
        global_rows=1,
        per_row=False,
    )
    assert predicted_positions(batch, "autoregressive").tolist() == [[False, True, True, False, True, False]]
    assert predicted_positions(batch, "masked_diffusion").tolist() == [[True] * 5 + [False]]
    joined = Batch(**{**vars(batch), "segment_ids": None})
    assert predicted_positions(joined, "autoregressive").tolist() == [[False, True, True, True, True, False]]


def test_wrong_settings_are_refused_by_name() -> None:
    for bad, named in (
        ({"schedule": "exponential"}, "schedule 'exponential'"),
        ({"random_length": 1.5}, "objective: random_length"),
        ({"kind": "causal"}, "objective: kind .*not 'causal'"),
    ):
        with pytest.raises(UserError, match=named):
            ObjectiveConfig(**bad)  # type: ignore[arg-type]


def counting_batch(**changes: Any) -> Batch:
    """Two rows of four tokens, of two documents each, in slots 0 and 1."""
    values: dict[str, Any] = {
        "tokens": torch.tensor([[4, 2, 0, 3], [1, 1, 2, 4]]),
        "segment_ids": torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]]),
        "maskable": torch.ones(2, 4).bool(),
        "slots": torch.arange(2),
        "epochs": torch.zeros(2).long(),
        "sample_ids": torch.tensor([7, 9]),
        "step": 3,
        "global_rows": 2,
        "per_row": False,
    }
    return Batch(**{**values, **changes})


class Recorder:
    """A network of random logits that keeps what it was asked."""

    def __init__(self) -> None:
        self.logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))

    def __call__(
        self, tokens: Tensor, *, segment_ids: Tensor | None, logits_at: Tensor, read_out: ReadOut
    ) -> Tensor:
        self.tokens, self.segment_ids, self.logits_at = tokens, segment_ids, logits_at
        return read_out(self.logits.flatten(0, 1)[logits_at], torch.eye(6))


@pytest.mark.parametrize("subs", [False, True])
def test_the_objective_is_noise_forward_loss(subs: bool) -> None:
    batch, network = counting_batch(), Recorder()
    config = ObjectiveConfig(schedule="loglinear", subs=subs)
    loss = objective_loss(network, corrupt(batch, config, seed=5, mask_id=5), normalizer=8)
    noisy = add_noise(batch, config, 5, 5)
    assert noisy.masked.any()
    assert torch.equal(network.tokens, noisy.tokens)
    assert torch.equal(network.logits_at, noisy.masked.flatten().nonzero()[:, 0])
    assert network.segment_ids is batch.segment_ids
    logits = network.logits[:, :, :5] if subs else network.logits
    expected = masked_diffusion_loss(logits, batch.tokens, noisy, normalizer=8)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kind", ["masked_diffusion", "block_diffusion"])
def test_without_carry_over_what_is_not_masked_counts_once(kind: Any) -> None:
    batch = counting_batch(maskable=torch.tensor([[True] * 4, [False, True, True, True]]))
    config = ObjectiveConfig(kind=kind, schedule="loglinear", subs=True, carry_over=False)
    normalizer = torch.tensor([4.0, 6.0])
    micro = corrupt(batch, config, normalizer=normalizer, seed=5, mask_id=5, block_length=2)
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    nats = -logits.log_softmax(-1).gather(-1, batch.tokens[..., None])[..., 0].double()
    noisy = add_noise(batch, config, 5, 5, 2)
    assert noisy.masked.any()
    assert (batch.maskable & ~noisy.masked).any()
    expected = 0.0
    for row, column in batch.maskable.nonzero().tolist():
        weight = noisy.weight[row, column] if kind == "block_diffusion" else noisy.weight[row]
        counts = weight if noisy.masked[row, column] else 1.0
        expected += counts * nats[row, column] / normalizer[row]
    asked = F.pad(logits, (0, 1)).flatten(0, 1)[micro.positions]  # SUBS: column 5 does not matter
    loss = weighted_nats(asked, torch.eye(6), micro.targets, micro.scale, excluded_id=micro.excluded_id)
    torch.testing.assert_close(loss, expected.float())
    assert torch.equal(micro.tokens, noisy.tokens)


def test_the_autoregressive_objective_predicts_within_documents_without_noise() -> None:
    batch, network = counting_batch(), Recorder()
    config = ObjectiveConfig(kind="autoregressive")
    normalizer = torch.tensor([2.0, 4.0])
    loss = objective_loss(network, corrupt(batch, config, normalizer=normalizer, seed=5, mask_id=None))
    assert torch.equal(network.tokens, batch.tokens)
    predicted = torch.tensor([[False, True, False, True], [False, True, True, False]])
    assert torch.equal(network.logits_at, predictors(predicted).flatten().nonzero()[:, 0])
    expected = next_token_loss(
        network.logits[predictors(predicted)], batch.tokens, predicted, normalizer=normalizer
    )
    torch.testing.assert_close(loss, expected)


def test_attention_opens_step_by_step() -> None:
    """Causal at first, then evenly farther, then all: of the step and the rows' length alone."""
    seen = [annealed_lookahead(step, 4, 100) for step in range(6)]
    assert seen == [0, 25, 50, 75, None, None]
    assert [annealed_lookahead(step, 1000, 10) for step in (0, 99, 100, 999, 1000)] == [0, 0, 1, 9, None]
    assert annealed_lookahead(0, 0, 10) is None
    config = ObjectiveConfig(attention_annealing_steps=4)
    batch = counting_batch()
    for step, expected in [(0, 0), (3, 3), (4, None)]:
        micro = corrupt(replace(batch, step=step), config, seed=5, mask_id=5)
        assert micro.lookahead == expected
    for kind in ("autoregressive", "block_diffusion"):
        with pytest.raises(UserError, match="attention_annealing_steps is for kind masked_diffusion"):
            ObjectiveConfig(kind=kind, attention_annealing_steps=4)


def test_at_the_first_step_of_annealing_the_loss_is_that_of_causal_attention() -> None:
    shape = {"vocab_size": 6, "d_model": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24, "max_length": 16}
    network = Transformer(ModelConfig(**shape, mask_token_id=5))
    network.init_weights(1)
    causal = Transformer(ModelConfig(**shape, mask_token_id=5, causal=True))
    causal.load_state_dict(network.state_dict())
    batch = counting_batch(step=0, segment_ids=None)

    def loss(model: Transformer, steps: int) -> Tensor:
        return objective_loss(
            model, corrupt(batch, ObjectiveConfig(attention_annealing_steps=steps), seed=5, mask_id=5)
        )

    torch.testing.assert_close(loss(network, 9), loss(causal, 0))
    assert not torch.allclose(loss(network, 9), loss(network, 0))


def perturbation(batch: Batch, config: ObjectiveConfig, **changes: Any) -> tuple[Tensor, Tensor]:
    """What is added to the embeddings (b, C, D) that the first layer reads, and the tokens (b, L) of the forward."""
    shape = {"vocab_size": 6, "d_model": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "max_length": 16}
    network = Transformer(ModelConfig(**shape, mask_token_id=5, **changes))
    network.init_weights(1)
    read: list[Tensor] = []
    network.layers[0].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    micro = corrupt(batch, config, seed=5, mask_id=5, block_length=network.config.block_length)
    objective_loss(network, micro)
    columns = micro.tokens if micro.context is None else torch.cat([micro.tokens, micro.context], dim=1)
    return (read[0] - network.embed(columns)).detach(), micro.tokens


@pytest.mark.parametrize(
    ("knobs", "changes"),
    [
        ({}, {}),
        ({"carry_over": False}, {}),
        ({"kind": "block_diffusion", "schedule": "loglinear", "subs": True}, {"block_length": 2}),
    ],
    ids=str,
)
def test_noise_is_on_the_embeddings_of_masked_tokens_alone(knobs: dict, changes: dict) -> None:
    """Also where unmasked ones are predicted too, and where the clean tokens stand behind the noised ones."""
    config = ObjectiveConfig(**knobs, embedding_noise=EmbeddingNoiseConfig(std=0.5, steps=10))
    batch = counting_batch(step=0)
    noise, tokens = perturbation(batch, config, **changes)
    assert torch.equal(noise.any(-1)[:, :4], tokens == 5)
    assert (tokens == 5).any()
    assert not noise[:, 4:].any()
    later, also = perturbation(replace(batch, step=6), config, **changes)
    both = (tokens == 5) & (also == 5)
    assert both.any()
    torch.testing.assert_close(later[:, :4][both], 0.4 * noise[:, :4][both])
    assert not perturbation(replace(batch, step=10), config, **changes)[0].any()


def test_noise_on_embeddings_belongs_to_the_sample() -> None:
    """Alone or in company, in another place of the batch; each epoch, sample, seed and column has its own."""
    config = ObjectiveConfig(
        schedule="loglinear",
        time=TimeConfig(t_min=0.999),
        embedding_noise=EmbeddingNoiseConfig(std=0.5, steps=10),
    )
    batch = counting_batch(step=0)
    noise, _ = perturbation(batch, config)
    assert noise.flatten(1).any(1).all()
    for rows in (torch.tensor([1]), torch.tensor([1, 0])):
        assert torch.equal(perturbation(batch.select(rows), config)[0], noise[rows])
    drawn = [
        perturbation(replace(batch, **changes), config)[0].flatten(0, 1)
        for changes in ({}, {"epochs": batch.epochs + 1}, {"sample_ids": batch.sample_ids + 100})
    ]
    assert len({tuple(row) for row in torch.cat(drawn).tolist() if any(row)}) > 20


def test_noise_on_embeddings_tames_the_gradient_of_a_mask_that_decayed_to_nothing() -> None:
    shape = {
        "vocab_size": 64,
        "d_model": 32,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_dim": 48,
        "max_length": 64,
    }
    network = Transformer(ModelConfig(**shape, mask_token_id=5))
    network.init_weights(1)
    tokens = torch.randint(6, 64, (8, 64), generator=torch.Generator().manual_seed(0))
    rows = {"slots": torch.arange(8), "epochs": torch.zeros(8).long(), "sample_ids": torch.arange(8)}
    maskable = torch.ones(8, 64).bool()
    batch = counting_batch(tokens=tokens, segment_ids=None, maskable=maskable, step=0, global_rows=8, **rows)

    def gradient(noise: EmbeddingNoiseConfig) -> float:
        micro = corrupt(batch, ObjectiveConfig(embedding_noise=noise), seed=5, mask_id=5)
        (moved,) = torch.autograd.grad(objective_loss(network, micro, normalizer=512), network.embed.weight)
        return float(moved[5].norm())

    usual = gradient(EmbeddingNoiseConfig())
    spread = float(network.embed.weight.detach().std())
    torch.nn.init.zeros_(network.embed.weight[5].detach())
    assert gradient(EmbeddingNoiseConfig()) > 50 * usual
    assert gradient(EmbeddingNoiseConfig(spread, steps=10)) < 2 * usual


def test_without_noise_on_embeddings_nothing_is_asked_of_the_network() -> None:
    for config in (ObjectiveConfig(), ObjectiveConfig(embedding_noise=EmbeddingNoiseConfig(0.5, 4))):
        micro = corrupt(counting_batch(step=4), config, seed=5, mask_id=5)
        assert (micro.embedding_noise_keys, micro.embedding_noise_std) == (None, None)
        objective_loss(Recorder(), micro)  # which knows no `perturb`
    with pytest.raises(UserError, match="embedding_noise is for masked tokens"):
        ObjectiveConfig(kind="autoregressive", embedding_noise=EmbeddingNoiseConfig(0.5, 4))


BLOCKS = ObjectiveConfig(kind="block_diffusion", schedule="loglinear", subs=True)


def block_network(block_length: int) -> Transformer:
    shape = {"vocab_size": 6, "d_model": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24, "max_length": 16}
    model = Transformer(ModelConfig(**shape, mask_token_id=5, block_length=block_length))
    model.init_weights(1)
    return model


@pytest.mark.parametrize("with_documents", [False, True])
def test_block_diffusion_is_a_loss_for_each_block(with_documents: bool) -> None:
    """In one forward, with its gradients, what a forward for each noised block behind the clean ones before it gives."""
    B, L, size = 3, 11, 4
    network = block_network(size)
    generator = torch.Generator().manual_seed(0)
    documents = torch.tensor([[0] * 5 + [1] * 6, [0] * 11, [3] * 8 + [-1] * 3])
    batch = counting_batch(
        tokens=torch.randint(0, 5, (B, L), generator=generator),
        segment_ids=documents if with_documents else None,
        maskable=torch.rand(B, L, generator=generator) < 0.9,
        slots=torch.arange(B),
        epochs=torch.zeros(B).long(),
        sample_ids=torch.arange(B),
        global_rows=B,
    )
    normalizer = torch.tensor([7.0, 9.0, 4.0])
    micro = corrupt(batch, BLOCKS, normalizer=normalizer, seed=5, mask_id=5, block_length=size)
    loss = objective_loss(network, micro)
    (grad,) = torch.autograd.grad(loss, network.layers[0].k_proj.weight)

    noisy = add_noise(batch, BLOCKS, 5, 5, size)
    total = torch.zeros(())
    for row in range(B):
        runs = documents[row].unique_consecutive(return_counts=True)[1].tolist() if with_documents else [L]
        start = 0
        for length in runs:
            for begin in range(start, start + length, size):
                block = slice(begin, min(begin + size, start + length))
                alone = torch.cat([batch.tokens[row, start:begin], noisy.tokens[row, block]])
                logits = network(alone[None])[0, begin - start :, :5]  # SUBS: the mask is ruled out
                nats = -logits.log_softmax(-1).gather(-1, batch.tokens[row, block, None])[:, 0]
                scale = noisy.weight[row, block] * noisy.masked[row, block] / normalizer[row]
                total = total + (nats * scale).sum()
            start += length
    torch.testing.assert_close(loss, total.float(), rtol=1e-5, atol=1e-6)
    (expected,) = torch.autograd.grad(total, network.layers[0].k_proj.weight)
    torch.testing.assert_close(grad, expected.float(), rtol=1e-4, atol=1e-6)


def test_positions_are_rounded_up_and_what_fills_up_counts_nothing() -> None:
    """So a GPU meets few shapes: 33 of a micro-batch's positions."""
    rows, L = 4, 80
    numbers = set()
    for step in range(40):
        batch = counting_batch(
            tokens=torch.arange(rows * L).reshape(rows, L) % 5,
            segment_ids=None,
            maskable=torch.ones(rows, L).bool(),
            slots=torch.arange(rows),
            epochs=torch.zeros(rows).long(),
            sample_ids=torch.arange(rows),
            step=step,
            global_rows=rows,
        )
        micro = corrupt(batch, ObjectiveConfig(), seed=5, mask_id=5)
        noisy = add_noise(batch, ObjectiveConfig(), 5, 5)
        n = int(noisy.masked.sum())
        numbers.add(len(micro.positions))
        assert n <= len(micro.positions) < n + rows * L // 32
        assert len(micro.positions) == len(micro.targets) == len(micro.scale)
        assert (micro.scale[n:] == 0).all()
        assert torch.equal(micro.targets[:n], batch.tokens[noisy.masked])
        assert torch.equal(micro.tokens.flatten()[micro.positions[:n]], torch.full((n,), 5))
    assert all(number % (rows * L // 32) == 0 for number in numbers)


def test_positions_know_the_noise_of_their_row_or_block() -> None:
    for config, block in ((ObjectiveConfig(time=TimeConfig(t_min=0.3)), None), (BLOCKS, 2)):
        batch = counting_batch()
        micro, noisy = (f(batch, config, 5, 5, block) for f in (corrupt_for, add_noise))
        prob = noisy.mask_prob if block else noisy.mask_prob[:, None].expand(batch.tokens.shape)
        levels = [int(10 * p) for p in prob[noisy.masked].tolist()]
        assert micro.noise is not None
        assert micro.noise.tolist() == levels + [10] * (len(micro.positions) - len(levels))
        assert len(set(levels)) > 1
    copies = corrupt(counting_batch(), ObjectiveConfig(carry_over=False), seed=5, mask_id=5)
    masked = add_noise(counting_batch(), ObjectiveConfig(), 5, 5).masked
    assert copies.noise is not None
    assert (
        (copies.noise < 10).sum() == masked.sum() < len(copies.noise)
    )  # what is known tells nothing of masks
    causal = corrupt(counting_batch(), ObjectiveConfig(kind="autoregressive"), seed=5, mask_id=None)
    assert causal.noise is None
    certain = counting_batch(tokens=torch.zeros(2, 4).long())
    full = corrupt(certain, ObjectiveConfig(time=TimeConfig(t_min=1 - 1e-9)), seed=5, mask_id=5)
    assert full.noise is not None
    assert full.noise.max() == 9  # all of a row


def corrupt_for(
    batch: Batch, config: ObjectiveConfig, seed: int, mask_id: int, block: int | None
) -> MicroBatch:
    return corrupt(batch, config, seed=seed, mask_id=mask_id, block_length=block)


def test_every_block_has_a_noise_level_of_its_own() -> None:
    batch = counting_batch()
    u = torch.tensor([0.25, 0.75], dtype=torch.float64)
    golden = (5**0.5 - 1) / 2
    levels = spread_over_blocks(u, batch, 2)
    # Row 0: two documents of one block each; row 1: one of two blocks, and one of one.
    expected = [[0.25, 0.25, 0.25 + golden, 0.25 + golden], [0.75, 0.75, 0.75 + golden, 0.75 + 2 * golden]]
    torch.testing.assert_close(levels, torch.tensor(expected, dtype=torch.float64) % 1)
    joined = spread_over_blocks(u, counting_batch(segment_ids=None), 4)
    assert torch.equal(joined, u[:, None].expand(2, 4))  # one block is the row


def test_block_diffusion_counts_every_position_once() -> None:
    """E[weight · masked] = 1 at every position, so the bound is not bent towards some blocks."""
    rows = 20_000
    batch = counting_batch(
        tokens=torch.zeros(rows, 6).long(),
        segment_ids=None,
        maskable=torch.ones(rows, 6).bool(),
        slots=torch.arange(rows),
        epochs=torch.zeros(rows).long(),
        sample_ids=torch.arange(rows),
        global_rows=rows,
    )
    config = ObjectiveConfig(kind="block_diffusion", schedule="llada", time=TimeConfig(t_min=0.1))
    noisy = add_noise(batch, config, 0, 5, 2)
    mean = (noisy.weight * noisy.masked).mean(0)
    # Var[weight · masked] = E[1/p] − 1, below 3 from t = 0.1 on: five standard errors.
    torch.testing.assert_close(mean, torch.ones(6, dtype=mean.dtype), rtol=0, atol=5 * (3 / rows) ** 0.5)
    in_block = noisy.mask_prob.unflatten(1, (3, 2))
    assert torch.equal(in_block[..., 0], in_block[..., 1])
    assert (in_block[:, 0] != in_block[:, 1]).all()


def test_a_compiled_network_is_not_compiled_anew_for_each_number_of_masks() -> None:
    """Nor does it learn anything else."""
    model = block_network(4)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    graphs = []
    for step in range(6):
        batch = counting_batch(step=step)
        grads = []
        for network in (model, compiled):
            micro = corrupt(batch, BLOCKS, seed=5, mask_id=5, block_length=4)
            loss = objective_loss(network, micro, normalizer=8)
            grads.append(torch.autograd.grad(loss, list(model.parameters())))
        torch.testing.assert_close(grads[0], grads[1])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    counts = {int(add_noise(counting_batch(step=step), BLOCKS, 5, 5, 4).masked.sum()) for step in range(6)}
    assert len(counts) > 2
    assert graphs[-1] == graphs[1]


def test_the_identity_of_a_run_does_not_name_what_it_does_not_use() -> None:
    """Checkpoints that were written before a setting existed are of the same run."""
    first = {"kind", "schedule", "time", "subs", "document_mask", "random_length"}
    times = {"sampling", "density", "t_min", "t_max"}
    content = ObjectiveConfig().content()
    assert (content.keys(), content["time"].keys()) == (first, times)
    content = ObjectiveConfig(time=TimeConfig(density="bell"), random_split=0.3, carry_over=False).content()
    assert (content["random_split"], content["carry_over"]) == (0.3, False)
    assert content["time"].keys() == {*times, "bell_center", "bell_width"}
    content = ObjectiveConfig(embedding_noise=EmbeddingNoiseConfig(0.5, 4)).content()
    assert content["embedding_noise"] == {"std": 0.5, "steps": 4}
