"""Which masked positions to commit at a step: a table of small functions.

A rule sees the candidates of each row as one table (b rows, C slots): the masks of the block that the row works on, in
the order of their columns. It returns which slots are committed; a row for which it chooses none commits its first
candidate, so that no rule can spin. A new rule is a function and a row of `RULES`; `--sampling.remasking`, `generate` and
the HTTP body know it by its name. A rule with a knob of its own (a field of `SamplingConfig`) is switched on by it.

Shape legend: b rows at work, C slots, N candidates in all, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llada.diffusion.noise import row_keys, stream_key, uniforms_of
from llada.diffusion.schedule import NoiseSchedule, get_schedule
from llada.registry import Registry
from llada.sampling.draw import certainty, confidence
from llada.settings import require

if TYPE_CHECKING:
    from llada.sampling.canvas import Canvas
    from llada.sampling.config import SamplingConfig

# Streams of a row's noise: different purposes, unrelated numbers.
_ORDER, _COIN = stream_key(0, "order"), stream_key(0, "coin")


@dataclass(frozen=True)
class Candidates:
    """What a rule may look at. Tables hold −∞ (or what is asked for) in the slots behind a row's last candidate."""

    logits: Tensor
    """(N, V) at least float32, on the network's device, what must not be written at −∞; without temperature, which must not
    enter a confidence. Not to be changed."""
    tokens: Tensor
    """(N,): what a position becomes if it is committed."""
    row: Tensor
    """(N,): the row, of the b at work, in which a candidate stands."""
    slot: Tensor
    """(N,): its place among the row's candidates."""
    shape: tuple[int, int]
    """(b, C)."""
    quota: Tensor
    """(b,): how many to commit so that the block is full after its steps, equally many at each (LLaDA)."""
    knob: Tensor
    """(b, 1) float64: each row's value of the setting that has switched the rule on; 0 for a rule that goes by its name."""
    noise_keys: Tensor
    """(N,) of the row's seed, its forward and the position."""
    doubt: Tensor
    """(N,): by how many nats rounding may have moved the logit of the token."""
    unsure_ids: Tensor | None
    """(N, n): ids that count as impossible in a confidence; None: no row has any."""

    def table(self, values: Tensor, fill: float = -torch.inf) -> Tensor:
        """values (N,) as a table (b, C)."""
        table = torch.full(self.shape, fill, dtype=values.dtype, device=values.device)
        table[self.row, self.slot] = values
        return table

    def of_rows(self, rows: Tensor) -> Candidates:
        """Those of some rows (b,) bool alone."""
        here = rows[self.row]
        slot = self.slot[here]
        return Candidates(
            logits=self.logits[here.to(self.logits.device)],
            tokens=self.tokens[here],
            row=(rows.cumsum(0) - 1)[self.row[here]],
            slot=slot,
            shape=(int(rows.sum()), int(slot.max()) + 1),
            quota=self.quota[rows],
            knob=self.knob[rows],
            noise_keys=self.noise_keys[here],
            doubt=self.doubt[here],
            unsure_ids=None if self.unsure_ids is None else self.unsure_ids[here],
        )

    @cached_property
    def exists(self) -> Tensor:
        """(b, C) bool: the slots that hold a candidate."""
        return self.table(torch.zeros_like(self.row, dtype=torch.float64)) == 0

    @cached_property
    def confidence(self) -> Tensor:
        """(b, C): the model's probability of the token."""
        logits, tokens = self.logits, self.tokens.to(self.logits.device)
        if self.unsure_ids is not None:
            logits = logits.scatter(1, self.unsure_ids.to(logits.device), -torch.inf)
        own = logits.gather(1, tokens[:, None]).squeeze(1)
        return self.table(torch.where(own > -torch.inf, confidence(logits, tokens), 0.0).cpu())

    @cached_property
    def confidence_slack(self) -> Tensor:
        """(b, C): confidences so near to each other are equal but for rounding: p (1 − p) · doubt."""
        confidence = self.confidence.clamp(min=0)
        return confidence * (1 - confidence) * self.table(self.doubt, 0.0)

    @cached_property
    def certainty(self) -> Tensor:
        """(b, C): minus the entropy of the model's distribution, in nats."""
        return self.table(certainty(self.logits).cpu())

    @cached_property
    def certainty_slack(self) -> Tensor:
        """(b, C): as `confidence_slack`; Σ p |log p + H| ≤ 2 H bounds what a nat of doubt does to the entropy H."""
        return -2 * self.certainty.clamp(min=-1e30) * self.table(self.doubt, 0.0)

    @cached_property
    def uniform(self) -> Tensor:
        """(b, C): noise in [0, 1), drawn anew at each forward of a row."""
        return self.table(uniforms_of(row_keys(_ORDER, self.noise_keys)))


@dataclass(frozen=True)
class Rule:
    """`choose` returns the slots to commit, bool (b, C)."""

    choose: Callable[[Candidates], Tensor]
    knob: str | None = None
    """The setting of `SamplingConfig` that switches the rule on; None: it goes by its name in `remasking`."""
    temperature: float = 0.0
    """At which tokens are drawn where the settings say nothing."""
    heeds: tuple[str, ...] = ()
    """Which of the settings that only some rules heed it does (`OF_SOME_RULES`); with others they are refused."""
    due_steps: Callable[[Canvas], Tensor] | None = None
    """For a rule that decides beforehand at which step of its block a position is unmasked: int64 (B, L). Only what is
    due is then a candidate, and steps at which nothing is due cost no forward."""


def highest(scores: Tensor, count: Tensor, slack: Tensor | None = None) -> Tensor:
    """The `count` (b,) highest scores (b, C) of each row; of equals the lower column comes first.

    Equal are the scores no further than its `slack` (b, C) from the lowest one that is chosen: what is the same but for
    rounding is decided by the column in any batch and on any machine.
    """
    ranked, order = scores.sort(dim=1, descending=True, stable=True)
    place = (count - 1).clamp(0, scores.shape[1] - 1)[:, None]
    lowest = ranked.gather(1, place)
    margin = 0.0 if slack is None else slack.gather(1, order.gather(1, place))
    certain = scores > lowest + margin
    equal = (scores >= lowest - margin) & (scores > -torch.inf) & ~certain
    return certain | (equal & (certain.sum(1, keepdim=True) + equal.cumsum(1) <= count[:, None]))


def above(scores: Tensor, threshold: float | Tensor, slack: Tensor | None = None) -> Tensor:
    """All scores ≥ threshold, and the highest in any case (Fast-dLLM, arXiv 2505.22618)."""
    one = torch.ones_like(scores[:, 0], dtype=torch.int64)
    return (scores >= threshold) | (highest(scores, one, slack) & (scores < threshold).all(1, keepdim=True))


def passing_prefix(scores: Tensor, passes: Callable[[Tensor], Tensor], slack: Tensor | None = None) -> Tensor:
    """The longest beginning of each row's ranking all of which `passes` ((b, C) of ranked scores), at least one."""
    ranked = scores.sort(dim=1, descending=True, stable=True).values
    passed = passes(ranked)
    passed[:, :1] = True
    return highest(scores, passed.long().cumprod(1).sum(1), slack)


def by_factor(scores: Tensor, factor: float | Tensor, slack: Tensor | None = None) -> Tensor:
    """The longest prefix n of the ranking with c₍ₙ₎ ≥ 1 − factor/(n + 1), at least 1 (Fast-dLLM's factor rule)."""
    n = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    return passing_prefix(scores, lambda ranked: ranked >= 1 - factor / (n + 1), slack)


def by_entropy(certainty: Tensor, bound: float | Tensor, slack: Tensor | None = None) -> Tensor:
    """The largest k of the most certain positions with Σ_{i≤k} H_i − H_k ≤ bound, at least 1 (arXiv 2505.24857).

    The left side bounds the dependence among the committed tokens, in nats. `certainty` is −H.
    """

    def passes(ranked: Tensor) -> Tensor:
        entropy = -ranked
        # An empty slot's is infinite: it does not pass, and ∞ − ∞ is no number, which does not either.
        return entropy.cumsum(1) - entropy <= bound

    return passing_prefix(certainty, passes, slack)


def due_by_coin(canvas: Canvas) -> Tensor:
    """MDLM's reverse process: at each step of its block a mask goes with its own coin, at the last one in any case.

    A coin per step is one uniform number per position: it is due at the first step by which P(unmasked) exceeds it.
    """
    keys = row_keys(_COIN, canvas.seed_keys)
    uniform = uniforms_of(row_keys(keys[:, None], canvas.position))  # (B, L)
    steps = canvas.steps_of.gather(1, canvas.block_of)
    schedule = get_schedule(canvas.configs[0].schedule)  # all rows of a new canvas have the same
    due = torch.zeros_like(canvas.tokens)
    for count in steps.unique().tolist():
        here = steps == count
        by = unmasked_by(schedule, count)
        due[here] = torch.searchsorted(by, uniform[here], right=True)
    return due


def unmasked_by(schedule: NoiseSchedule, steps: int) -> Tensor:
    """(steps,) float64: P(a mask is unmasked at the latest at step 0, 1, …) when time goes from 1 to 0 in equal steps."""
    times = 1 - torch.arange(1, steps + 1, dtype=torch.float64) / max(1, steps)
    by = unmask_probability(schedule, torch.ones_like(times), times)
    by[-1:] = 1.0  # schedules that do not reach α = 1 at time 0 leave a rest to the last step
    return by


def unmask_probability(schedule: NoiseSchedule, t: Tensor, s: Tensor) -> Tensor:
    """P(a mask is unmasked on the way from time t to s < t) = (α_s − α_t) / (1 − α_t) (MDLM Eq. 7), elementwise."""
    return 1 - schedule.mask_prob(s) / schedule.mask_prob(t)


_SUPPRESSES = ("confidence_eos_eot_inf",)
_RULES = {
    "low_confidence": Rule(lambda c: highest(c.confidence, c.quota, c.confidence_slack), heeds=_SUPPRESSES),
    "random": Rule(lambda c: highest(c.uniform, c.quota)),
    "ancestral": Rule(lambda c: c.exists, temperature=1.0, due_steps=due_by_coin, heeds=("schedule",)),
    "threshold": Rule(
        lambda c: above(c.confidence, c.knob, c.confidence_slack), knob="threshold", heeds=_SUPPRESSES
    ),
    "factor": Rule(
        lambda c: by_factor(c.confidence, c.knob, c.confidence_slack), knob="factor", heeds=_SUPPRESSES
    ),
    "entropy": Rule(lambda c: by_entropy(c.certainty, c.knob, c.certainty_slack), knob="entropy_bound"),
}
OF_SOME_RULES = ("confidence_eos_eot_inf", "schedule")
RULES: Registry[Rule] = Registry("remasking rule", _RULES)
# {setting: the rule that it switches on}.
RULE_OF_KNOB = {rule.knob: rule for rule in _RULES.values() if rule.knob}


def find_rule(config: SamplingConfig) -> Rule:
    """The rule that the settings ask for. Raises UserError for an unknown one, for two at once, and for a setting that it
    would not heed."""
    rule = _choose_rule(config)
    for name in OF_SOME_RULES:
        value = getattr(config, name)
        require(
            name in rule.heeds or value == type(config).__dataclass_fields__[name].default,
            f"sampling: {name}={value!r} means nothing to remasking={config.remasking!r}"
            f"{f' with {rule.knob}' if rule.knob else ''}: leave it out, or choose another rule",
        )
    return rule


def _choose_rule(config: SamplingConfig) -> Rule:
    named = RULES.find(config.remasking)
    require(
        named.knob is None or getattr(config, named.knob) is not None,
        f"sampling: remasking={config.remasking!r} needs the setting {named.knob}",
    )
    knobs = [knob for knob in RULE_OF_KNOB if getattr(config, knob) is not None]
    if not knobs:
        return named
    require(
        len(knobs) == 1 and (config.remasking == "low_confidence" or named.knob == knobs[0]),
        f"sampling: {' and '.join(knobs)} with remasking={config.remasking!r}: choose one rule, and the parallel ones "
        "need low_confidence",
    )
    return named if named.knob else RULE_OF_KNOB[knobs[0]]
