"""The one denoising loop: it walks a canvas block by block and commits tokens until no mask is left.

`generate` builds a canvas of prompt + masks, `infill` takes one with holes; `denoise` walks either, one forward at a
time, and yields after each, so that a server can stream, cancel and interleave. LLaDA's reverse process is
generate.py of ML-GSAI/LLaDA; `remasking="ancestral"` is MDLM's sampler, which skips the forwards that would change nothing.

Kept at every step: the mask token is never produced, a committed token never changes, nothing is committed after the
first EOS, and a forward is only run when it can commit something. Rows are independent: each has its own random
generator, and a left-padded batch gives each row what it would get alone.

Shape legend: B rows, P prompt columns, G generated columns, L = P + G, V vocabulary rows, n candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llada.diffusion.likelihood import Model, guided_predict, resolve_mask_id
from llada.diffusion.objective import exclude
from llada.diffusion.schedule import NoiseSchedule, get_schedule
from llada.sampling import rules

Remasking = Literal["low_confidence", "random", "ancestral"]


@dataclass(frozen=True)
class SamplingConfig:
    """How to walk the canvas. Names and defaults as in LLaDA's generate.py; at most one parallel rule may be set."""

    gen_length: int = 128
    steps: int = 128  # forwards over the whole canvas, shared out among the blocks
    block_length: int = 128  # blocks are finished left to right; the last one may be short
    temperature: float = 0.0  # of the Gumbel noise; 0 is greedy. Ignored by "ancestral", which samples at 1
    cfg_scale: float = 0.0
    remasking: Remasking = "low_confidence"
    threshold: float | None = None  # commit every confidence ≥ this
    factor: float | None = None  # Fast-dLLM's factor rule
    entropy_bound: float | None = None  # nats
    schedule: str = "loglinear"  # of the ancestral sampler: how many masks should be left at each step

    def __post_init__(self) -> None:
        for name in ("gen_length", "steps", "block_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampling: {name} must be at least 1, not {getattr(self, name)}")
        if self.temperature < 0 or self.cfg_scale < 0:
            raise ValueError("sampling: temperature and cfg_scale must not be negative")
        if self.remasking not in ("low_confidence", "random", "ancestral"):
            raise ValueError(
                f"sampling: remasking {self.remasking!r} is none of low_confidence, random, ancestral"
            )
        parallel = [n for n in ("threshold", "factor", "entropy_bound") if getattr(self, n) is not None]
        if len(parallel) > 1 or (parallel and self.remasking != "low_confidence"):
            raise ValueError(
                f"sampling: {' and '.join(parallel)} with remasking={self.remasking!r}: choose one rule, "
                "and the parallel ones need low_confidence"
            )
        get_schedule(self.schedule)


@dataclass
class Canvas:
    """The tokens being denoised and what has happened to them. Row r is done when no candidate of it is left."""

    tokens: Tensor  # (B, L) int64
    mask_id: int
    prompt: Tensor  # (B, L) bool: given tokens and padding, what classifier-free guidance hides
    attention_mask: Tensor | None  # (B, L), 0 on padding
    start: int  # first column that may be generated
    reveal_step: Tensor  # (B, L) int64: forward that committed the token, -1 where none did
    nfe: int = 0  # forwards so far
    token_forwards: int = 0  # tokens fed to the network so far, guidance's copies included
    generators: list[torch.Generator | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        padding = None if self.attention_mask is None else self.attention_mask == 0
        if padding is not None and bool((padding & (self.tokens == self.mask_id)).any()):
            raise ValueError(
                f"sampling: the padding must not be the mask token {self.mask_id}, which would be filled"
            )


class GenerateOutput(NamedTuple):
    sequences: Tensor  # (B, P + G) int64, prompt included
    nfe: int  # forwards of the network (a batch counts once; guidance's doubled batch too)
    token_forwards: int  # tokens fed to the network, all rows
    reveal_step: (
        Tensor  # (B, G): 0-based forward that committed the token; -1 where none did (after EOS, or given)
    )


def build_generators(seed: int | Sequence[int] | None, rows: int, device: torch.device) -> list:
    """One generator a row: an int seeds row i with seed + i, a sequence gives each row its own, None is random."""
    if seed is None:
        seeds: Sequence[int] = [int(torch.randint(2**62, ()).item()) for _ in range(rows)]
    elif isinstance(seed, int):
        seeds = [seed + row for row in range(rows)]
    else:
        seeds = list(seed)
        if len(seeds) != rows:
            raise ValueError(f"{len(seeds)} seeds for {rows} rows")
    return [torch.Generator(device=device).manual_seed(s) for s in seeds]


def build_canvas(
    prompt: Tensor | Sequence[Sequence[int]],
    gen_length: int,
    *,
    mask_id: int,
    attention_mask: Tensor | None = None,
    seed: int | Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> Canvas:
    """Prompt + masks. Lists of different lengths are left-padded (right padding would change RoPE distances)."""
    if not isinstance(prompt, Tensor):
        if attention_mask is not None:
            raise ValueError("generate: attention_mask goes with a tensor prompt; lists are padded here")
        width = max((len(row) for row in prompt), default=0)
        rows = torch.full((len(prompt), width), int(mask_id == 0), dtype=torch.int64)  # any id but the mask
        attention_mask = torch.zeros(len(prompt), width, dtype=torch.int64)
        for r, row in enumerate(prompt):
            rows[r, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
            attention_mask[r, width - len(row) :] = 1
        prompt = rows
    if prompt.dim() == 1:
        prompt = prompt[None]
    device = device or prompt.device
    prompt = prompt.to(device)
    B, P = prompt.shape
    masks = torch.full((B, gen_length), mask_id, dtype=torch.int64, device=device)
    tokens = torch.cat([prompt, masks], dim=1)
    if attention_mask is not None:
        attention_mask = attention_mask.to(device).reshape(B, P)
        attention_mask = torch.cat(
            [attention_mask, torch.ones_like(masks, dtype=attention_mask.dtype)], dim=1
        )
    return Canvas(
        tokens=tokens,
        mask_id=mask_id,
        prompt=tokens != mask_id,
        attention_mask=attention_mask,
        start=P,
        reveal_step=torch.full_like(tokens, -1),
        generators=build_generators(seed, B, tokens.device),
    )


def denoise(
    model: Model, canvas: Canvas, config: SamplingConfig, *, eos_id: int | None = None
) -> Iterator[Canvas]:
    """Walk the canvas to its end, yielding it (changed in place) after every forward.

    Args:
        eos_id: once this id is committed, everything right of it becomes EOS and is never denoised. None: fixed length.
    """
    L = canvas.tokens.shape[1]
    blocks = range(canvas.start, L, config.block_length)
    for begin, steps in zip(blocks, rules.split_steps(config.steps, len(blocks)), strict=True):
        end = min(begin + config.block_length, L)
        yield from _denoise_block(model, canvas, config, end, steps, eos_id)


def _denoise_block(
    model: Model,
    canvas: Canvas,
    config: SamplingConfig,
    end: int,
    steps: int,
    eos_id: int | None,
) -> Iterator[Canvas]:
    # Everything left of `end` that is still masked: the block, and in the first one any hole in the prompt.
    holes = (canvas.tokens[:, :end] == canvas.mask_id).sum(1).tolist()
    quotas = [rules.quota_schedule(n, min(steps, n)) if n else [] for n in holes]
    parallel = config.threshold is not None or config.factor is not None or config.entropy_bound is not None
    step = 0
    while True:
        candidates = [(row[:end] == canvas.mask_id).nonzero().squeeze(1) for row in canvas.tokens]
        if config.remasking == "ancestral":
            picks = _ancestral_picks(canvas, candidates, config, step, steps)
        else:
            picks = [
                c if len(c) and (parallel or step < len(q)) else c[:0]
                for c, q in zip(candidates, quotas, strict=True)
            ]
        active = [r for r, pick in enumerate(picks) if len(pick)]
        if active:
            logits = _forward(model, canvas, active, picks, config.cfg_scale)
            for r, row_logits in zip(active, logits, strict=True):
                quota = len(picks[r]) if parallel or config.remasking == "ancestral" else quotas[r][step]
                _commit(canvas, r, picks[r], row_logits, config, quota, eos_id)
            canvas.nfe += 1
            yield canvas
        elif not any(len(c) for c in candidates) or step >= steps:
            return
        step += 1


def _forward(
    model: Model, canvas: Canvas, active: list[int], picks: list[Tensor], cfg_scale: float
) -> list[Tensor]:
    """Float64 logits (n, V) at each active row's candidates, the mask token excluded. Finished rows are not run."""
    tokens = canvas.tokens[active]
    inputs: dict[str, Tensor] = {}
    if canvas.attention_mask is not None:
        inputs["attention_mask"] = canvas.attention_mask[active]
    where = torch.zeros_like(tokens, dtype=torch.bool)
    for i, r in enumerate(active):
        where[i, picks[r]] = True
    with torch.no_grad():
        logits = guided_predict(
            model, tokens, where, canvas.prompt[active], cfg_scale, canvas.mask_id, **inputs
        )
    canvas.token_forwards += tokens.numel() * (2 if cfg_scale else 1)
    return list(exclude(logits.double(), canvas.mask_id).split([len(picks[r]) for r in active]))


def _commit(
    canvas: Canvas,
    row: int,
    positions: Tensor,
    logits: Tensor,
    config: SamplingConfig,
    quota: int,
    eos_id: int | None,
) -> None:
    """Choose tokens at the candidate positions (n,) from logits (n, V), and commit some of them."""
    generator = canvas.generators[row]
    temperature = 1.0 if config.remasking == "ancestral" else config.temperature
    tokens = gumbel_argmax(logits, temperature, generator)
    if config.remasking == "ancestral":
        chosen = torch.ones_like(tokens, dtype=torch.bool)
    elif config.remasking == "random":
        confidence = torch.rand(len(tokens), generator=generator, device=logits.device, dtype=torch.float64)
        chosen = rules.by_quota(confidence, quota)
    elif config.entropy_bound is not None:
        log_probs = logits.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs.clamp(min=-1e30)).sum(-1)
        chosen = rules.by_entropy(entropy, config.entropy_bound)
    else:
        # From the un-noised logits: temperature must not enter the confidence.
        confidence = logits.softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        if config.threshold is not None:
            chosen = rules.by_threshold(confidence, config.threshold)
        elif config.factor is not None:
            chosen = rules.by_factor(confidence, config.factor)
        else:
            chosen = rules.by_quota(confidence, quota)
    positions, tokens = positions[chosen], tokens[chosen]
    if eos_id is not None:
        ends = positions[(tokens == eos_id) & (positions >= canvas.start)]
        if len(ends):
            first = int(ends.min())
            tokens, positions = tokens[positions <= first], positions[positions <= first]
            rest = canvas.tokens[row, first:]
            rest[rest == canvas.mask_id] = eos_id
    canvas.tokens[row, positions] = tokens
    canvas.reveal_step[row, positions] = canvas.nfe


def gumbel_argmax(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """argmax(logits + temperature · Gumbel noise): a sample of softmax(logits / temperature), (n,) from (n, V).

    In float64, because low-precision Gumbel noise truncates the tail and lowers the effective temperature
    (arXiv 2409.02908).
    """
    if temperature == 0:
        return logits.argmax(-1)
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=torch.float64)
    return (logits - temperature * torch.log(-torch.log(uniform))).argmax(-1)


def unmask_probability(schedule: NoiseSchedule, t: float, s: float) -> float:
    """P(a masked token is unmasked on the way from time t to s < t) = (α_s − α_t) / (1 − α_t) (MDLM Eq. 7)."""
    at = schedule.mask_prob(torch.tensor([t, s], dtype=torch.float64))
    return float((at[0] - at[1]) / at[0])


def _ancestral_picks(
    canvas: Canvas, candidates: list[Tensor], config: SamplingConfig, step: int, steps: int
) -> list[Tensor]:
    """MDLM's reverse step: each mask goes with its own coin; the last step takes the rest."""
    if step >= steps:
        return [c[:0] for c in candidates]
    schedule = get_schedule(config.schedule)
    p = 1.0 if step == steps - 1 else unmask_probability(schedule, 1 - step / steps, 1 - (step + 1) / steps)
    picks = []
    for positions, generator in zip(candidates, canvas.generators, strict=True):
        coins = torch.rand(len(positions), generator=generator, device=positions.device, dtype=torch.float64)
        picks.append(positions[coins < p])
    return picks


def generate(
    model: Model,
    prompt: Tensor | Sequence[Sequence[int]],
    *,
    gen_length: int = 128,
    steps: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: Remasking = "low_confidence",
    cache: None = None,
    threshold: float | None = None,
    factor: float | None = None,
    entropy_bound: float | None = None,
    schedule: str = "loglinear",
    attention_mask: Tensor | None = None,
    mask_id: int | None = None,
    eos_id: int | None = None,
    seed: int | Sequence[int] | None = None,
) -> GenerateOutput:
    """Continue prompts by denoising `gen_length` masks behind them.

    Args:
        prompt: (B, P) int64, left-padded with `attention_mask` (B, P) 0 on the padding; or lists of ids of any lengths.
        remasking: "low_confidence", "random" (LLaDA), or "ancestral" (MDLM: each step unmasks by coin, sampling from the
            model's own distribution; `block_length` below `gen_length` makes it semi-autoregressive).
        eos_id: end the text at the first EOS. None keeps LLaDA's fixed length, tokens after EOS included.
        seed: per row; the same seed gives a row the same text in any batch.

    Raises:
        ValueError: no mask id, contradictory knobs, or `cache`, which this sampler does not have.
    """
    if cache is not None:
        raise ValueError(f"generate: cache={cache!r} is not available, use cache=None")
    mask_id = resolve_mask_id(model, mask_id)
    config = SamplingConfig(
        gen_length,
        steps,
        block_length,
        temperature,
        cfg_scale,
        remasking,
        threshold,
        factor,
        entropy_bound,
        schedule,
    )
    canvas = build_canvas(
        prompt, gen_length, mask_id=mask_id, attention_mask=attention_mask, seed=seed, device=device_of(model)
    )
    return _finish(model, canvas, config, eos_id)


def infill(
    model: Model,
    tokens_with_masks: Tensor,
    *,
    steps: int = 128,
    block_length: int | None = None,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: Remasking = "low_confidence",
    cache: None = None,
    threshold: float | None = None,
    factor: float | None = None,
    entropy_bound: float | None = None,
    schedule: str = "loglinear",
    attention_mask: Tensor | None = None,
    mask_id: int | None = None,
    seed: int | Sequence[int] | None = None,
) -> GenerateOutput:
    """Fill the mask tokens of (B, L) `tokens_with_masks`; everything else stays. `reveal_step` is (B, L).

    `block_length` cuts the whole row into blocks; None makes it one.
    """
    if cache is not None:
        raise ValueError(f"infill: cache={cache!r} is not available, use cache=None")
    mask_id = resolve_mask_id(model, mask_id)
    tokens = tokens_with_masks if tokens_with_masks.dim() == 2 else tokens_with_masks[None]
    L = tokens.shape[1]
    config = SamplingConfig(
        L,
        steps,
        block_length or L,
        temperature,
        cfg_scale,
        remasking,
        threshold,
        factor,
        entropy_bound,
        schedule,
    )
    tokens = tokens.to(device_of(model) or tokens.device).clone()
    canvas = Canvas(
        tokens=tokens,
        mask_id=mask_id,
        prompt=tokens != mask_id,
        attention_mask=None if attention_mask is None else attention_mask.to(tokens.device),
        start=0,
        reveal_step=torch.full_like(tokens, -1),
        generators=build_generators(seed, len(tokens), tokens.device),
    )
    return _finish(model, canvas, config, None)


def _finish(model: Model, canvas: Canvas, config: SamplingConfig, eos_id: int | None) -> GenerateOutput:
    for _ in denoise(model, canvas, config, eos_id=eos_id):
        pass
    return GenerateOutput(
        canvas.tokens, canvas.nfe, canvas.token_forwards, canvas.reveal_step[:, canvas.start :]
    )


def device_of(model: Model) -> torch.device | None:
    """Where the network's parameters are; None for a plain function."""
    parameters = getattr(model, "parameters", None)
    return next(parameters()).device if parameters else None
