"""The knobs of the sampler, each declared once: its default, its limits, its documentation, and who may set it.

`generate`, `infill`, the command line, the endpoint's defaults and the HTTP body are all derived from `SamplingConfig`.
This file imports no torch, so that the HTTP front process can read the knobs and stay small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields
from numbers import Integral
from typing import Any, Literal, cast

from llada.settings import check_limits, limited, require, shorten

_MANY = 1_000_000  # no canvas is so long, no schedule so fine, and a stronger guidance leaves what floats can hold


def knob(
    default: Any, *, per_request: bool = True, request_high: float | None = None, **limits: float
) -> Any:
    """A field of `SamplingConfig`. `per_request`: a client of the endpoint may set it, up to `request_high`."""
    return limited(default, per_request=per_request, request_high=request_high, **limits)


@dataclass(frozen=True)
class SamplingConfig:
    """How to walk the canvas. Names and defaults as in LLaDA's generate.py; at most one parallel rule may be set, and no
    setting that the chosen rule would not heed."""

    gen_length: int = knob(128, low=1, high=_MANY, per_request=False)
    """Masks behind the prompt; with `initial_length` the most there may come to be."""
    steps: int | None = knob(None, low=1, high=_MANY, request_high=4096)
    """At most so many forwards over the whole canvas, shared out among the blocks that hold masks, each of which needs at
    least one; the parallel rules may take fewer, never more. None takes one for each mask, as LLaDA's 128 steps do for its
    128 masks."""
    block_length: int = knob(128, low=1)
    """Blocks are finished left to right; the last one may be short."""
    temperature: float | None = knob(None, low=0, high=100, request_high=2)
    """Of the Gumbel noise; 0 is greedy, and the same text each time even without a seed. None: 1 for the rules that reverse
    the noise process ("ancestral", "remdm", "first_hitting"), which sample, 0 for the others."""
    top_p: float = knob(1.0, low=0, high=1)
    """Draw from the fewest of the likeliest tokens that together have this probability at the temperature; 1 is all.
    This, `top_k` and `min_p` each count over all tokens, what is as likely as the last one kept is kept, and
    confidences remain those of the whole distribution."""
    top_k: int = knob(0, low=-1, high=_MANY)
    """Draw from so many of the likeliest tokens; 0 or -1 is all."""
    min_p: float = knob(0.0, low=0, high=1)
    """Draw from the tokens that are at least this times as likely as the likeliest one; 0 is all."""
    stratified: bool = knob(False)
    """Spread the random numbers of a row's positions evenly over [0, 1) instead of taking independent ones, each still
    as likely as before: those that tokens are drawn with at a step, and the coins of "ancestral" and "remdm" in a
    block, of which then as many masks go at each step as should, and not by chance more or fewer."""
    cfg_scale: float = knob(0.0, low=0, high=_MANY)
    """Strength of the classifier-free guidance, which doubles a forward; 0 is off."""
    remasking: str = knob("low_confidence")
    """What to commit at a step: the most certain ("low_confidence") or any ("random", both LLaDA's), the first from the left
    ("leftmost"), the clearest by its "margin" over the next best, or by coin with the model's own distribution ("ancestral",
    MDLM's; "first_hitting", the same with a step for each token); or a rule with a knob of its own, below; see
    llada/sampling/rules.py."""
    threshold: float | None = knob(None, low=0, high=1)
    """Commit every confidence of at least this, and the highest in any case (Fast-dLLM)."""
    factor: float | None = knob(None, low=0)
    """Commit the n highest confidences while the n-th is at least 1 − factor / (n + 1) (Fast-dLLM)."""
    entropy_bound: float | None = knob(None, low=0)
    """Commit the most certain positions while their dependence is bounded by this many nats (EB-Sampler)."""
    error_bound: float | None = knob(None, low=0, high=_MANY)
    """Commit the most confident positions while the sum of what their confidences lack to 1 is at most this, which
    bounds the probability that any of them is not what the model would have written."""
    leap_threshold: float | None = knob(None, low=0, high=1)
    """Commit every confidence of at least `leap_anchor`, and those of at least this much beside it (LocalLeap, whose authors
    take 0.75)."""
    leap_anchor: float = knob(0.9, low=0, high=1)
    """Of LocalLeap: the confidence from which a position is an anchor."""
    leap_radius: int = knob(4, low=0, high=_MANY)
    """Of LocalLeap: so many positions on both sides of an anchor are beside it."""
    remdm_cap: float | None = knob(None, low=0, high=1)
    """Sample as "ancestral" does, but at each step let every token of the block become a mask again with this
    probability, or the most that leaves the number of masks as it is (ReMDM-cap, whose authors take 0.008 for long
    runs); 0 is "ancestral"."""
    p2_eta: float | None = knob(None, low=0, high=_MANY)
    """At each step keep the most confident tokens of the block, as many as are due by then, and mask the others again, also
    those committed before, whose log-confidence counts this many times (P2's self-planning): 1 as that of the others, 0 lets
    them stay, more masks them the sooner."""
    cache: str | None = knob(None)
    """Feed only a part of the canvas between the first forwards of its blocks, and see the rest as it was then: "prefix" the
    block and what follows, "dual" the block (both Fast-dLLM's), "vicinity" the block and its neighbours (dInfer); or run
    only a part of it in each layer, "interval" (dLLM-Cache); see llada/sampling/cache.py. Approximate; None feeds
    everything."""
    refresh_every: int | None = knob(None, low=1)
    """With a cache, feed everything at least at each so many forwards; 1 is exact."""
    vicinity: int = knob(16, low=0)
    """Of cache="vicinity": tokens on both sides of the block that are fed with it."""
    prompt_interval: int = knob(50, low=1, high=_MANY)
    """Of cache="interval": the layers run the prompt at each so many forwards of a row (dLLM-Cache's K_p)."""
    response_interval: int = knob(7, low=1, high=_MANY)
    """Of cache="interval": they run everything behind the prompt at each so many forwards (K_r)."""
    refresh_share: float = knob(0.25, low=0, high=1)
    """Of cache="interval": the share of what is behind the prompt that they run in between, where the values have turned
    the most (ρ)."""
    initial_length: int | None = knob(None, low=1, high=_MANY)
    """Begin with at most so many masks, and add more, up to `gen_length`, as long as the model sees no end of the text among
    the last ones (DAEDAL, whose authors take 64); see llada/sampling/length.py. None begins with all."""
    expansion_length: int = knob(8, low=2, high=_MANY)
    """Of initial_length: so many masks are added to the end at a time, or put in the place of one."""
    eos_window: int = knob(32, low=1, high=_MANY)
    """Of initial_length: the end is looked for in at most so many of the last masks."""
    eos_threshold: float = knob(0.5, low=0, high=1)
    """Of initial_length: masks are added to the end while that certain end, as a mean over the window, is not seen."""
    insert_below: float | None = knob(None, low=0, high=1)
    """Of initial_length: put masks also in the place of one whose likeliest token has less than this probability (DAEDAL's
    second stage, whose authors take 0.1), the least probable of the block at each forward; `steps` are then left out."""
    insert_eos_threshold: float = knob(0.9, low=0, high=1)
    """Of insert_below: masks are put in while that certain end is not seen."""
    suffix_window: int | None = knob(None, low=0)
    """Feed only so many of the tokens behind the block (Streaming-dLLM); None feeds all. 0 is a canvas that grows by blocks
    until EOS (iLLaDA). Not where something given stands behind the masks."""
    shared_depth: float = knob(0.0, low=0, high=1)
    """The share of the layers, from the first and rounded down, that run the prompt's beginning once for all rows that
    have the same, with masks alone behind it (BiCache); see llada/sampling/prefixes.py. Approximate, the more so the
    deeper; 0 is exact."""
    shared_prefix: int | None = knob(None, low=1)
    """Of shared_depth: how many tokens of the prompt, at most, are its beginning; None: all of it."""
    schedule: str = knob("loglinear")
    """Noise schedule of "ancestral" and "remdm": how many masks should be left at each step."""
    logits_eos_inf: bool = knob(False)
    """Never write the end of the text (LLaDA's setting for HumanEval)."""
    confidence_eos_eot_inf: bool = knob(False)
    """Count the ends of the text and of a turn as impossible in the confidences, so that they are committed last (LLaDA's
    setting for GSM8K, MATH, GPQA and MBPP; at any temperature, where LLaDA's code does it for EOS at 0 alone)."""
    fixed: dict[int, int | str] | None = knob(None)
    """{position behind the prompt, from 0: token id, or text as it stands, its first space included}: written before the
    first step, kept, and never behind the end of the text. generate() knows no words and takes ids alone."""
    allowed: dict[int | Literal["*"], tuple[int | str, ...]] | None = knob(None)
    """{position behind the prompt, from 0: token ids, or texts that are one token each}: nothing else is written there, and
    the text does not end before. "*" is every position that is not named; an end of the text is a token like others."""
    forbidden: dict[int | Literal["*"], tuple[int | str, ...]] | None = knob(None)
    """{position behind the prompt, or "*" for all: token ids, or texts that are one token each}: not written there."""

    def __post_init__(self) -> None:
        check_limits(self, "sampling")
        for name in ("remasking", "schedule", *(["cache"] if self.cache is not None else [])):
            value = getattr(self, name)
            require(isinstance(value, str), f"sampling: {name} must be a name, not {shorten(value)}")
        _check_fixed(self.fixed, self.gen_length)
        for name in ("allowed", "forbidden"):
            _check_tokens(name, getattr(self, name), self.gen_length)
        _check_constraints(self)
        # Here and not above: both need torch, which a process that only reads the knobs does without.
        from llada.diffusion.schedule import get_schedule
        from llada.sampling.cache import find_cache
        from llada.sampling.length import check_length
        from llada.sampling.rules import find_rule, temperature_of

        require(
            self.shared_prefix is None or self.shared_depth > 0,
            f"sampling: shared_prefix={self.shared_prefix!r} means nothing without shared_depth",
        )
        find_rule(self)
        if self.temperature is None and temperature_of(self) == 0:
            _refuse_without_temperature(self)
        require(
            self.leap_threshold is None or self.leap_threshold <= self.leap_anchor,
            f"sampling: leap_threshold={self.leap_threshold} lies above leap_anchor={self.leap_anchor}: at most that",
        )
        find_cache(self)
        check_length(self)
        get_schedule(self.schedule)

    def in_force(self) -> dict[str, Any]:
        """The settings that are heeded beside the others."""
        from llada.sampling.cache import OF_SOME_CACHES, find_cache
        from llada.sampling.length import idle_settings
        from llada.sampling.rules import OF_SOME_RULES, find_rule

        mode = find_cache(self)
        idle = {*OF_SOME_RULES, *OF_SOME_CACHES} - {*find_rule(self).heeded, *(mode.heeds if mode else ())}
        idle.update(idle_settings(self))
        return {name: value for name, value in asdict(self).items() if name not in idle}


def _refuse_without_temperature(config: SamplingConfig) -> None:
    """Raise UserError for what says how to draw, where the rule draws nothing unless it is told a temperature."""
    for name in ("top_p", "top_k", "min_p", "stratified"):
        value = getattr(config, name)
        idle = (0, -1) if name == "top_k" else (SamplingConfig.__dataclass_fields__[name].default,)
        require(
            value in idle,
            f"sampling: {name}={value!r} means nothing without a temperature, because remasking={config.remasking!r} takes "
            "the likeliest token: set temperature too",
        )


def _check_fixed(fixed: object, gen_length: int) -> None:
    if fixed is None:
        return
    require(isinstance(fixed, Mapping), f"sampling: fixed must map positions to tokens, not {shorten(fixed)}")
    assert isinstance(fixed, Mapping)
    for position, token in fixed.items():
        require(
            _is_count(position) and position < gen_length,
            f"sampling: fixed holds the position {shorten(position)}; those behind the prompt are 0 to {gen_length - 1}",
        )
        require(
            _is_token(token),
            f"sampling: fixed puts {shorten(token)} at position {position}, which is neither a token id nor a text",
        )


def _check_tokens(name: str, tokens: object, gen_length: int) -> None:
    """Raise UserError unless these map positions to lists of tokens."""
    if tokens is None:
        return
    require(
        isinstance(tokens, Mapping), f"sampling: {name} must map positions to tokens, not {shorten(tokens)}"
    )
    assert isinstance(tokens, Mapping)
    for position, given in tokens.items():
        require(
            position == "*" or (_is_count(position) and position < gen_length),
            f"sampling: {name} holds the position {shorten(position)}; those behind the prompt are 0 to {gen_length - 1}, "
            'and "*" is all',
        )
        require(
            isinstance(given, tuple | list) and len(given) > 0,
            f"sampling: {name} must hold a list of tokens at position {position}, not {shorten(given)}",
        )
        for token in given:
            require(
                _is_token(token),
                f"sampling: {name} holds {shorten(token)} at position {position}, which is neither a token id nor a text",
            )


def _check_constraints(config: SamplingConfig) -> None:
    """Raise UserError where `fixed`, `allowed` and `forbidden` leave nothing that could stand at a position. Which ids
    a text stands for is not known yet."""
    fixed, allowed = dict[Any, Any](config.fixed or {}), dict[Any, Any](config.allowed or {})
    forbidden = dict[Any, Any](config.forbidden or {})

    def never(position: int | str) -> set[int | str]:
        return {*forbidden.get("*", ()), *forbidden.get(position, ())}

    for position, tokens in allowed.items():
        require(
            not never(position) >= {*tokens},
            f"sampling: forbidden takes all that allowed leaves at position {position}: {shorten(list(tokens))}",
        )
    for position, token in fixed.items():
        require(
            token not in never(position),
            f"sampling: forbidden names {shorten(token)}, which fixed puts at position {position}",
        )
        named = allowed.get(position, [token])
        require(
            token in named or any(isinstance(word, str) for word in (token, *named)),
            f"sampling: allowed does not name {shorten(token)}, which fixed puts at position {position}",
        )


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _is_token(value: object) -> bool:
    """Whether it may name one: an id, of which no vocabulary has 2³¹, or a text."""
    return value != "" if isinstance(value, str) else _is_count(value) and cast("int", value) < 2**31


def check_room(config: SamplingConfig, given: int, context: int | None) -> None:
    """Raise UserError where `given` tokens of a prompt and a suffix leave no room for the reply in the network's context."""
    room = given if context is None else context - given
    remedy = f"at most gen_length={room} fits" if room > 0 else "shorten what is given"
    require(
        context is None or config.gen_length <= room,
        f"sampling: gen_length={config.gen_length} beside {given} given tokens: a canvas of {given + config.gen_length} "
        f"tokens exceeds the context length of {context}: {remedy}",
    )


def check_window(config: SamplingConfig, *, is_given_behind: bool) -> None:
    """Raise UserError where something is given behind the masks, and the window would hide it."""
    require(
        config.suffix_window is None or not is_given_behind,
        f"sampling: suffix_window={config.suffix_window} would hide what is given behind the masks: leave it out",
    )


def request_knobs() -> list[Field[Any]]:
    """The knobs that a client of the endpoint may set."""
    return [field for field in fields(SamplingConfig) if field.metadata["per_request"]]
