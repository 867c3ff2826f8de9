"""The forward process and the loss: the heart. A training step calls `corrupt` on its rows, ahead of time, and
`objective_loss` on what that gives; everything else is below them.

One function pair serves every objective. LLaDA (arXiv 2502.09992, Eq. 3): −E_t[1/p Σ_masked log p(x₀|xₜ)] / (B·L).
MDLM (arXiv 2406.07524, Eq. 10): weight −α′/(1−α), mask logit at −∞. BERT: constant mask rate. SFT is not another loss:
it is which positions may be masked and what each row is divided by. Block diffusion (BD3-LM, arXiv 2503.09573, Eq. 8) is
the same loss of a block-causal network, whose blocks have noise levels of their own and see the earlier ones clean. The
autoregressive baseline shares the cross-entropy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llada.diffusion.batch import NOISE_BUCKETS, Batch, MicroBatch
from llada.diffusion.cross_entropy import token_cross_entropy, weighted_nats
from llada.diffusion.embedding_noise import EmbeddingNoiseConfig, add_noise_at
from llada.diffusion.noise import row_keys, row_uniforms, sample_keys
from llada.diffusion.schedule import NoiseSchedule, get_schedule
from llada.diffusion.time import TimeConfig, sample_uniform, time_and_weight
from llada.model.attention import block_numbers
from llada.settings import check_limits, limited, require

ObjectiveKind = Literal["masked_diffusion", "block_diffusion", "autoregressive"]

# The positions of a micro-batch are rounded up to a multiple of one of so many parts of it.
POSITION_STEPS = 32
# Steps of it fill [0, 1) evenly, however many there are.
_GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned: LLaDA is schedule "llada", MDLM is "loglinear" with `subs`, the 15 % baseline is "bert"."""

    kind: ObjectiveKind = "masked_diffusion"
    """Predict masked tokens from both sides; or ("block_diffusion", with model.block_length) from their own block and the
    earlier ones, which stand there unmasked; or ("autoregressive", with model.causal) the next one from the left."""
    schedule: str = "llada"
    """Noise schedule (llada/diffusion/schedule.py): how many tokens are masked at noise level t, and their weight."""
    time: TimeConfig = TimeConfig()
    subs: bool = False
    """MDLM: the mask token's logit is −∞ in the loss too."""
    carry_over: bool = True
    """What is not masked is known and no part of the loss. Without (MDLM's ablation) each such token counts −log p once: the
    reconstruction term of the bound, which carry-over makes zero."""
    document_mask: bool = True
    """A token attends only to its own document; LLaDA-8B was trained without."""
    random_length: float = limited(0.0, low=0, high=1)
    """Share of the steps whose rows are cut to a random length (LLaDA: 0.01). Idle on rows of one example."""
    random_split: float = limited(0.0, low=0, high=1)
    """Share of the rows that are split in two at a random place, neither part seeing the other (iLLaDA: 0.3): short contexts,
    and no token thrown away. Idle on rows of one example."""

    attention_annealing_steps: int = limited(0, low=0)
    """Steps over which a network that began autoregressive opens its eyes (DiffuLLaMA, arXiv 2410.17891): the first is causal,
    then a token sees a growing share of the row behind it; 0: all at once. Validation sees all from the beginning."""
    embedding_noise: EmbeddingNoiseConfig = EmbeddingNoiseConfig()

    def __post_init__(self) -> None:
        check_limits(self, "objective")
        get_schedule(self.schedule)
        require(
            self.attention_annealing_steps == 0 or self.kind == "masked_diffusion",
            f"objective: attention_annealing_steps is for kind masked_diffusion, not {self.kind}: leave it out",
        )
        require(
            self.embedding_noise.steps == 0 or self.kind != "autoregressive",
            "objective: embedding_noise is for masked tokens, of which kind autoregressive has none: leave it out",
        )

    def content(self) -> dict[str, Any]:
        """The settings as a run's identity holds them: all, but those of a bell, discrete time, a split, an annealing or noise on
        embeddings where there is none, and carry-over where there is."""
        settings = asdict(self)
        if self.carry_over:
            del settings["carry_over"]
        if not self.random_split:
            del settings["random_split"]
        if not self.attention_annealing_steps:
            del settings["attention_annealing_steps"]
        if not self.embedding_noise.steps:
            del settings["embedding_noise"]
        if self.time.density != "bell":
            for name in ("bell_center", "bell_width"):
                del settings["time"][name]
        if not self.time.levels:
            del settings["time"]["levels"]
        return settings


class NoisyBatch(NamedTuple):
    """xₜ and how it came about."""

    tokens: Tensor
    """(B, L) int64, mask tokens in place."""
    masked: Tensor
    """(B, L) bool: the positions to predict."""
    mask_prob: Tensor
    """(B,) P(masked) of a maskable position; (B, L) where each has its own."""
    weight: Tensor
    """Of the same shape: the weight of −log p at a masked position."""


def objective_loss(
    network: Callable[..., Tensor],
    micro: MicroBatch,
    *,
    normalizer: float | Tensor = 1.0,
    tally: Tensor | None = None,
) -> Tensor:
    """The objective on these rows: one forward of the network, the loss. A scalar in nats.

    Args:
        network: (b, L) tokens → what `read_out` makes of the N positions of `logits_at` (`Transformer.forward`).
        micro: of `corrupt`.
        normalizer: a scalar that the sum is divided by, beside what `micro.scale` holds of it already.
        tally: (NOISE_BUCKETS, 2) float64, to which −log p of each noise level's positions and their number are added.
    """
    inputs: dict[str, Any] = {} if micro.context is None else {"context": micro.context}
    if micro.lookahead is not None:
        inputs["lookahead"] = micro.lookahead
    if micro.embedding_noise_keys is not None:
        assert micro.embedding_noise_std is not None
        inputs["perturb"] = functools.partial(
            add_noise_at,
            positions=micro.positions,
            keys=micro.embedding_noise_keys,
            std=micro.embedding_noise_std,
            length=micro.tokens.shape[1],
        )
    return network(
        micro.tokens,
        segment_ids=micro.segment_ids,
        logits_at=micro.positions,
        read_out=functools.partial(
            weighted_nats,
            targets=micro.targets,
            scale=micro.scale / normalizer,
            excluded_id=micro.excluded_id,
            buckets=micro.noise,
            tally=tally,
        ),
        **inputs,
    )


def corrupt(
    batch: Batch,
    config: ObjectiveConfig,
    *,
    normalizer: float | Tensor = 1.0,
    seed: int,
    mask_id: int | None,
    block_length: int | None = None,
) -> MicroBatch:
    """These rows as the network is fed them: noised, with the positions to predict and what each counts.

    Of positions there are a multiple of a 32nd of all: with so few shapes, a GPU's allocator and its kernels meet each soon.

    Args:
        normalizer: what the sum is divided by; (b,) gives each row its own (see `masked_diffusion_loss`).
        seed: of the noise, which is a function of (seed, epoch, sample) and of the rows' places in the global batch.
        mask_id: id of the mask token; only the autoregressive objective does without.
        block_length: the network's, for block diffusion.
    """
    if config.kind == "autoregressive":
        predicted = predicted_positions(batch, config.kind)
        tokens, asked = batch.tokens, predictors(predicted)
        scale, noise = _next_token_scale(predicted, normalizer), None
    else:
        assert mask_id is not None
        noisy = add_noise(batch, config, seed, mask_id, block_length)
        if not config.carry_over:
            noisy = with_copies(noisy, batch.maskable)
        tokens, asked, predicted = noisy.tokens, noisy.masked, noisy.masked
        scale = _diffusion_scale(noisy, normalizer)
        noise = (_of_masked(noisy, noisy.mask_prob) * NOISE_BUCKETS).long().clamp(max=NOISE_BUCKETS - 1)
        noise[tokens[predicted] != mask_id] = NOISE_BUCKETS
    positions = asked.flatten().nonzero()[:, 0]
    step = -(-asked.numel() // POSITION_STEPS)
    filler = -len(positions) % step
    embedding_noise_keys = embedding_noise_std = None
    if std := config.embedding_noise.std_at(batch.step):
        assert mask_id is not None
        rows, columns = asked.nonzero(as_tuple=True)
        samples = sample_keys(seed, "mask-embedding", batch.epochs, batch.sample_ids)
        embedding_noise_keys = F.pad(row_keys(samples[rows], columns), (0, filler))
        embedding_noise_std = F.pad((tokens[asked] == mask_id).float() * std, (0, filler))
    return MicroBatch(
        tokens=tokens,
        segment_ids=batch.segment_ids,
        context=batch.tokens if config.kind == "block_diffusion" else None,
        positions=F.pad(positions, (0, filler)),
        targets=F.pad(batch.tokens[predicted], (0, filler)),
        scale=F.pad(scale, (0, filler)),
        excluded_id=mask_id if config.subs and config.kind != "autoregressive" else None,
        lookahead=annealed_lookahead(batch.step, config.attention_annealing_steps, batch.tokens.shape[1]),
        embedding_noise_keys=embedding_noise_keys,
        embedding_noise_std=embedding_noise_std,
        noise=None if noise is None else F.pad(noise, (0, filler), value=NOISE_BUCKETS),
    )


def annealed_lookahead(step: int, annealing_steps: int, length: int) -> int | None:
    """How many columns behind itself a token sees at this step (0-based): none at first, evenly more, then all (None).

    The nearest come first. DiffuLLaMA opens pairs at random instead, with which no tile of the attention stays empty, and
    a step's mask would be a draw of its own.
    """
    return step * length // annealing_steps if step < annealing_steps else None


def predicted_positions(batch: Batch, kind: ObjectiveKind) -> Tensor:
    """(b, L) bool: what the loss is about. Autoregressive: what has a predecessor in its own document."""
    if kind != "autoregressive":
        return batch.maskable
    predicted = batch.maskable.clone()
    predicted[:, 0] = False
    if batch.segment_ids is not None:
        predicted[:, 1:] &= batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    return predicted


def add_noise(
    batch: Batch, config: ObjectiveConfig, seed: int, mask_id: int, block_length: int | None = None
) -> NoisyBatch:
    """xₜ of these rows: the mask from (seed, epoch, sample), the noise level from `config.time`; for block diffusion that of
    a row's first block, from which the others' follow."""
    u = sample_uniform(
        config.time.sampling,
        seed=seed,
        step=batch.step,
        slots=batch.slots,
        batch=batch.global_rows,
        epochs=batch.epochs,
        sample_ids=batch.sample_ids,
    )
    if config.kind == "block_diffusion":
        assert block_length is not None
        u = spread_over_blocks(u, batch, block_length)
    t, weight = time_and_weight(u, get_schedule(config.schedule), config.time)
    keys = sample_keys(seed, "train-mask", batch.epochs, batch.sample_ids)
    return forward_process(
        batch.tokens,
        t=t,
        schedule=config.schedule,
        maskable=batch.maskable,
        mask_id=mask_id,
        uniform=row_uniforms(keys, batch.tokens.shape[1]),
        weight=weight,
    )


def with_copies(noisy: NoisyBatch, maskable: Tensor) -> NoisyBatch:
    """The same with every maskable (B, L) position predicted: those that are not masked have the weight 1.

    MDLM's code (`_reconstruction_loss`) asks for them at t = 0, in a forward of its own; here xₜ has to do, at equal cost.
    """
    weight = noisy.weight if noisy.weight.dim() == 2 else noisy.weight[:, None]
    return noisy._replace(masked=maskable, weight=torch.where(noisy.masked, weight, 1.0))


def spread_over_blocks(u: Tensor, batch: Batch, block_length: int) -> Tensor:
    """(B, L) in [0, 1) from u (B,): each block's own, the same for all of its positions.

    From block to block u goes on by the golden ratio modulo 1: a row of many blocks covers all noise levels evenly, and
    each block keeps what the row had (uniform, or the batch's strata).
    """
    B, L = batch.tokens.shape
    block = block_numbers(None, batch.segment_ids, block_length, L, u.device).expand(B, L)
    begins = torch.zeros_like(block, dtype=torch.bool)
    begins[:, 1:] = block[:, 1:] != block[:, :-1]
    if batch.segment_ids is not None:  # a short document's only block is as its neighbour's number 0
        begins[:, 1:] |= batch.segment_ids[:, 1:] != batch.segment_ids[:, :-1]
    return (u[:, None] + begins.cumsum(1) * _GOLDEN_RATIO) % 1


def forward_process(
    tokens: Tensor,
    *,
    t: Tensor,
    schedule: str | NoiseSchedule,
    maskable: Tensor | None = None,
    mask_id: int,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
    weight: Tensor | None = None,
) -> NoisyBatch:
    """Mask every maskable token independently with probability 1 − α(t).

    Args:
        tokens: (B, L) int64 clean tokens x₀.
        t: (B,) noise levels in [0, 1], or (B, L) of each position.
        schedule: a schedule or its name ("llada": mask_prob = (1 − ε)t + ε).
        maskable: (B, L) bool, False on the prompt and on padding; None means all.
        mask_id: id of the mask token.
        generator: source of the noise, unless `uniform` gives it.
        uniform: (B, L) numbers in [0, 1); a token is masked where uniform < mask_prob.
        weight: loss weights of the shape of `t`; None takes the schedule's own (continuous-time bound for t uniform).

    Raises:
        ValueError: neither or both of `generator` and `uniform`.
    """
    if (generator is None) == (uniform is None):
        raise ValueError("forward_process: pass exactly one of generator and uniform")
    schedule = get_schedule(schedule)
    mask_prob = schedule.mask_prob(t)
    if uniform is None:
        uniform = torch.rand(tokens.shape, generator=generator, device=tokens.device)
    masked = uniform < (mask_prob if mask_prob.dim() == 2 else mask_prob[:, None])
    if maskable is not None:
        masked = masked & maskable
    return NoisyBatch(
        tokens=torch.where(masked, mask_id, tokens),
        masked=masked,
        mask_prob=mask_prob,
        weight=schedule.weight(t) if weight is None else weight,
    )


def masked_diffusion_loss(
    logits: Tensor,
    clean: Tensor,
    noisy: NoisyBatch,
    *,
    normalizer: float | Tensor,
    subs_mask_id: int | None = None,
) -> Tensor:
    """Σ weight · −log p(x₀ | xₜ) / normalizer over the masked positions: a scalar, in nats.

    Args:
        logits: (B, L, V), or (N, V) at the masked positions in row-major order (`logits_at=noisy.masked`).
        clean: (B, L) int64 x₀.
        normalizer: what the sum is divided by: B·L in pretraining (never the number of masked tokens, which would
            bias the bound); a (B,) tensor gives each row its own, in SFT B × its answer length, EOS padding included.
        subs_mask_id: MDLM's SUBS: this id (the mask) gets probability zero. Carry-over of clean tokens is implied, as
            only masked positions are predicted.
    """
    nats = token_cross_entropy(
        logits if logits.dim() == 2 else logits[noisy.masked], clean[noisy.masked], excluded_id=subs_mask_id
    )
    return (nats * _diffusion_scale(noisy, normalizer).to(nats.dtype)).sum()


def _diffusion_scale(noisy: NoisyBatch, normalizer: float | Tensor) -> Tensor:
    """(N,) float64: weight / normalizer of the masked positions."""
    scale = _of_masked(noisy, noisy.weight)
    if isinstance(normalizer, Tensor) and normalizer.dim():
        return scale / _of_masked(noisy, normalizer.reshape(-1))
    return scale / normalizer


def _of_masked(noisy: NoisyBatch, values: Tensor) -> Tensor:
    """(N,) at the masked positions, of values (B,) by row or (B, L) by position."""
    return values.reshape(len(values), -1).expand_as(noisy.masked)[noisy.masked]


def next_token_loss(
    logits: Tensor, clean: Tensor, predicted: Tensor, *, normalizer: float | Tensor
) -> Tensor:
    """The autoregressive baseline: Σ −log p(x₀ⁱ | x₀^{<i}) / normalizer.

    Args:
        logits: (N, V) of a causal network at the positions *before* the predicted ones (`predictors(predicted)`).
        predicted: (B, L) bool; column 0 has no predecessor and must be False.
    """
    nats = token_cross_entropy(logits, clean[predicted])
    return (nats * _next_token_scale(predicted, normalizer).to(nats.dtype)).sum()


def _next_token_scale(predicted: Tensor, normalizer: float | Tensor) -> Tensor:
    """(N,) float64: 1 / normalizer of the predicted positions."""
    rows, _ = predicted.nonzero(as_tuple=True)
    each = torch.as_tensor(normalizer, dtype=torch.float64, device=predicted.device).reshape(-1)
    return each.expand(len(predicted))[rows].reciprocal()


def predictors(predicted: Tensor) -> Tensor:
    """(B, L) bool of the positions whose logits predict the next one, for a causal network."""
    return F.pad(predicted[:, 1:], (0, 1))
