"""Which masked positions to commit at a step: a table of small functions.

    remasking        knob            source                   commits
    low_confidence                   LLaDA, 2502.09992        the most confident, as many at each step
    random                           LLaDA                    any, as many at each step
    leftmost                                                  the first from the left, as many at each step
    margin                           2502.06768               the furthest ahead of their next best token
    first_hitting                    2409.02908               any, as many at each step, drawn from the model
    ancestral        (schedule)      MDLM, 2406.07524         by coin, drawn from the model
    remdm            remdm_cap       ReMDM-cap, 2503.00307    the same, and takes tokens back by coin
    p2               p2_eta          P2, 2502.03540           the share that is due, and takes the least sure back
    threshold        threshold       Fast-dLLM, 2505.22618    every confidence of at least this
    factor           factor          Fast-dLLM                n, while the n-th is at least 1 − factor / (n + 1)
    entropy          entropy_bound   EB-Sampler, 2505.24857   the most certain, of a dependence up to this
    error            error_bound     by_error, below          while what confidences lack sums up to this
    local_leap       leap_threshold  LocalLeap, 2510.07081    leap_anchor, and this up to leap_radius away

(Sources by their arXiv numbers.) A knob of its own, a field of `SamplingConfig`, switches a rule on; the others are
named in `remasking`. The five at the end take as few forwards as they can, `steps` at the most.

A rule sees the candidates of each row as one table (b rows, C slots): the masks of the block that the row works on, in
the order of their columns (candidates.py). It returns which slots are committed; a row for which it chooses none
commits its first candidate, so that no rule can spin. A new rule is a function and a row of `RULES`; Python, the
command line (`--sampling.remasking`) and the HTTP body know it by its name.

What is committed stays, but with a rule that `may_remask`: until its block is done, a token may become a mask again, and
come back as another. Given tokens never do, nor does what ends a text, because what stands behind it is settled then.

Shape legend: b rows at work, C slots, L columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llada.errors import UserError
from llada.registry import Registry
from llada.sampling.candidates import Candidates
from llada.sampling.coins import due_by_coin, due_by_remdm, return_by_remdm
from llada.settings import require

if TYPE_CHECKING:
    from llada.sampling.canvas import Canvas
    from llada.sampling.config import SamplingConfig


@dataclass(frozen=True, eq=False)
class Rule:
    """`choose` returns the slots to commit, bool (b, C)."""

    choose: Callable[[Candidates], Tensor]
    knob: str | None = None
    """The setting of `SamplingConfig` that switches the rule on; None: it goes by its name in `remasking`."""
    beside: tuple[str, ...] = ()
    """Numbers of the settings that it reads as well (`Candidates.knobs`), which mean nothing to other rules."""
    temperature: float = 0.0
    """At which tokens are drawn where the settings say nothing."""
    heeds: tuple[str, ...] = ()
    """Which of the settings that only some rules heed it does (`OF_SOME_RULES`); with others they are refused."""
    due_steps: Callable[[Canvas], Tensor] | None = None
    """For a rule that decides beforehand at which step of its block a position is unmasked: int64 (B, L). Only what is
    due is then a candidate, and steps at which nothing is due cost no forward."""
    due_again: Callable[[Canvas, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """For one that decides beforehand, too, when a token becomes a mask again: of the tokens (b, L) that these rows
    (b,) have just committed, after which step of the block they do so (coins.NEVER: after none), and at which they are
    due then."""
    weighs_committed: bool = False
    """The tokens that were committed in the block are candidates as well, and become masks again where it does not choose
    them. It must choose all of them when the block's steps come to their end."""

    @property
    def heeded(self) -> tuple[str, ...]:
        """Of the settings in `OF_SOME_RULES` those that mean something to it."""
        return (*self.heeds, *self.beside)

    @property
    def may_remask(self) -> bool:
        """Whether a committed token may change while its block is not done."""
        return self.weighs_committed or self.due_again is not None


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


def by_error(scores: Tensor, bound: float | Tensor, slack: Tensor | None = None) -> Tensor:
    """The largest k of the most confident positions with Σ_{i≤k} (1 − c_i) ≤ bound, at least 1: a union bound.

    Let x be drawn from any joint distribution whose marginals are the network's, and x̂ be the tokens, of probabilities c_i.
    P(x ≠ x̂) = P(x_1 ≠ x̂_1 or … or x_k ≠ x̂_k) ≤ Σ (1 − c_i): what is committed together is, as a whole, what the model
    would have written with a probability of at least 1 − bound, however the positions depend on each other. Below ½ it is
    also the likeliest combination, the one that unmasking one by one aims at: Fast-dLLM's theorem 1 is the case of equal
    confidences. Unlike a threshold, which lets through n tokens that each may be wrong, the bound is on the step.
    """
    return passing_prefix(scores, lambda ranked: (1 - ranked).cumsum(1) <= bound, slack)


def by_leap(candidates: Candidates) -> Tensor:
    """LocalLeap (arXiv 2510.07081): all confidences of at least `leap_anchor` are anchors; they are committed, and so
    is every confidence of at least `leap_threshold` no further than `leap_radius` positions from one. The highest in
    any case."""
    confidence, (relaxed, high, radius) = candidates.confidence, candidates.knobs[:, :3, None].unbind(1)
    is_anchor = confidence >= high
    column = candidates.table(candidates.column.double())
    before = column.masked_fill(~is_anchor, -torch.inf).cummax(1).values
    behind = column.masked_fill(~is_anchor, torch.inf).flip(1).cummin(1).values.flip(1)
    is_near = torch.minimum(column - before, behind - column) <= radius
    return above(
        confidence, torch.where(is_near, torch.minimum(relaxed, high), high), candidates.confidence_slack
    )


def by_planning(candidates: Candidates) -> Tensor:
    """P2 with self-planning (arXiv 2502.03540): after step i of S, the share κ = i / S of the block's tokens stays, the most
    confident, masks and tokens that were committed before alike; the log-confidence of these counts `p2_eta` times."""
    c = candidates
    log = c.confidence.clamp(min=0).log().clamp(min=-1e30)
    weight = torch.where(c.table(c.is_held.double(), 0.0) > 0, c.knob, 1.0)
    score = (log * weight).masked_fill(~c.exists, -torch.inf)
    slack = (1 - c.confidence.clamp(min=0)) * weight * c.table(c.doubt, 0.0)
    count = c.exists.sum(1)
    left = count * (c.steps - 1 - c.step).clamp(min=0) // c.steps
    return highest(score, count - left, slack)


_SUPPRESSES = ("confidence_eos_eot_inf",)
_RULES = {
    "low_confidence": Rule(lambda c: highest(c.confidence, c.quota, c.confidence_slack), heeds=_SUPPRESSES),
    # Kim et al. (arXiv 2502.06768): sure is where no other token is nearly as likely.
    "margin": Rule(lambda c: highest(c.margin, c.quota, c.margin_slack), heeds=_SUPPRESSES),
    "random": Rule(lambda c: highest(c.uniform, c.quota)),
    "leftmost": Rule(lambda c: highest(c.table(-c.slot.double()), c.quota)),
    # The first-hitting sampler (arXiv 2409.02908). In continuous time no two masks go at once, and as all have the same
    # chance at any time, each is the next with equal probability; a network that is told no time need not know when. With a
    # step for each mask this is MDLM's process with infinitely many; with fewer, the masks go in groups.
    "first_hitting": Rule(lambda c: highest(c.uniform, c.quota), temperature=1.0),
    "ancestral": Rule(lambda c: c.exists, temperature=1.0, due_steps=due_by_coin, heeds=("schedule",)),
    "remdm": Rule(
        lambda c: c.exists,
        knob="remdm_cap",
        temperature=1.0,
        due_steps=due_by_remdm,
        due_again=return_by_remdm,
        heeds=("schedule",),
    ),
    "p2": Rule(by_planning, knob="p2_eta", weighs_committed=True, heeds=_SUPPRESSES),
    "threshold": Rule(
        lambda c: above(c.confidence, c.knob, c.confidence_slack), knob="threshold", heeds=_SUPPRESSES
    ),
    "factor": Rule(
        lambda c: by_factor(c.confidence, c.knob, c.confidence_slack), knob="factor", heeds=_SUPPRESSES
    ),
    "entropy": Rule(lambda c: by_entropy(c.certainty, c.knob, c.certainty_slack), knob="entropy_bound"),
    "error": Rule(
        lambda c: by_error(c.confidence, c.knob, c.confidence_slack), knob="error_bound", heeds=_SUPPRESSES
    ),
    "local_leap": Rule(
        by_leap, knob="leap_threshold", beside=("leap_anchor", "leap_radius"), heeds=_SUPPRESSES
    ),
}
OF_SOME_RULES = ("confidence_eos_eot_inf", "schedule", "leap_anchor", "leap_radius")
RULES: Registry[Rule] = Registry("remasking rule", _RULES)
# {setting: the rule that it switches on}.
RULE_OF_KNOB = {rule.knob: rule for rule in _RULES.values() if rule.knob}
# What chooses a rule and its numbers: who asks for another rule, asks for its own.
RULE_SETTINGS = (
    "remasking",
    "schedule",
    *(name for rule in _RULES.values() for name in (rule.knob, *rule.beside) if name),
)


def find_rule(config: SamplingConfig) -> Rule:
    """The rule that the settings ask for. Raises UserError for an unknown one, for two at once, and for a setting that it
    would not heed."""
    rule = _choose_rule(config)
    for name in OF_SOME_RULES:
        value = getattr(config, name)
        if name not in rule.heeded and value != type(config).__dataclass_fields__[name].default:
            raise UserError(
                f"sampling: {name}={value!r} means nothing to remasking={config.remasking!r}"
                f"{f' with {rule.knob}' if rule.knob else ''}: leave it out, or choose another rule"
            )
    return rule


def temperature_of(config: SamplingConfig) -> float:
    """At which tokens are drawn; 0 is greedy."""
    return find_rule(config).temperature if config.temperature is None else config.temperature


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
