"""What the papers publish, read from published.yaml: how each benchmark was run, and what came out.

A setting that is given by hand goes before a published one. As given counts what differs from its default, and what is named
in `BenchmarkConfig.given`, which the command line fills: so that a default, too, can be asked for.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from llada.errors import UserError, hint
from llada.evals.benchmarks.config import BenchmarkConfig
from llada.evals.requests.scoring import ScoreConfig
from llada.sampling.config import SamplingConfig
from llada.settings import from_dict, load_yaml, require

FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class Entry:
    """A benchmark in a setting; what it does not say is not published."""

    run_as: str | None = None
    num_fewshot: int | None = None
    chat: bool = False
    score: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    results: dict[str, float] = field(default_factory=dict)
    note: str = ""
    """What a reader of the table must know."""


@dataclass(frozen=True)
class Settings:
    """A model of a paper, as it was evaluated."""

    title: str
    of: str
    """Where it is published."""
    base: str | None = None
    benchmarks: dict[str, Entry] = field(default_factory=dict)
    others: dict[str, dict[str, float]] = field(default_factory=dict)
    """{another model: {benchmark: per cent}}, as the paper has them beside its own."""


@dataclass(frozen=True)
class Published:
    """All of published.yaml."""

    sources: dict[str, str]
    settings: dict[str, Settings]


@dataclass(frozen=True)
class Protocol:
    """How one benchmark is run here."""

    name: str
    """Of the benchmark as it was asked for."""
    run_as: str
    """Of the benchmark, or the task of lm_eval, that is run."""
    num_fewshot: int | None
    chat: bool
    score: ScoreConfig
    sampling: dict[str, Any]
    """Settings of SamplingConfig, but for gen_length."""
    gen_length: int | None
    results: dict[str, float]
    """{source: the published figure in per cent}."""
    given: tuple[str, ...]
    """The settings that are not as published."""
    note: str


@functools.cache
def published() -> Published:
    """The file's content."""
    return from_dict(Published, load_yaml(FILE, "table of published settings"))


def find_settings(name: str) -> Settings:
    """A named setting with the benchmarks of its base. Raises UserError naming the nearest one."""
    known = published().settings
    if name not in known:
        raise UserError(f"benchmarks: there are no published settings {name!r}; {hint(name, known)}")
    found = known[name]
    base = known[found.base].benchmarks if found.base else {}
    # What the base came out at is not what these settings did.
    inherited = {key: replace(entry, results={}) for key, entry in base.items()}
    return replace(found, benchmarks={**inherited, **found.benchmarks})


def protocol(name: str, config: BenchmarkConfig, sampling: SamplingConfig) -> Protocol:
    """How a benchmark is run by these settings. Raises UserError for published settings that do not know it."""
    entry = Entry()
    if config.settings is not None:
        known = find_settings(config.settings).benchmarks
        if name not in known:
            raise UserError(
                f"benchmarks: {config.settings} publishes nothing of {name!r}; {hint(name, known)}"
            )
        entry = known[name]
    own_score, own_sampling = _given(config.score, "score.", config), _given(sampling, "sampling.", config)
    # The task "samples" has the other one.
    own_sampling.pop("gen_length", None)
    own: dict[str, Any] = {}
    for key, default in (("num_fewshot", None), ("chat", False), ("gen_length", None)):
        if getattr(config, key) != default or key in config.given:
            own[key] = getattr(config, key)
    theirs = dict(entry.sampling)
    gen_length = theirs.pop("gen_length", None)
    gone_before = []
    if config.settings is not None:
        said = {"num_fewshot": entry.num_fewshot, "chat": entry.chat, "gen_length": gen_length}
        gone_before = [key for key in own if said[key] not in (None, own[key])]
        # What they do not name was at its default, of what is estimated or of what is written.
        if not entry.sampling:
            gone_before += _others(own_score, {**asdict(ScoreConfig()), **entry.score}, "score.")
        if not entry.score:
            gone_before += _others(own_sampling, {**asdict(SamplingConfig()), **theirs}, "sampling.")
    return Protocol(
        name=name,
        run_as=entry.run_as or name,
        num_fewshot=own.get("num_fewshot", entry.num_fewshot),
        chat=own.get("chat", entry.chat),
        score=from_dict(ScoreConfig, {**entry.score, **own_score}, "benchmarks.score."),
        sampling={**theirs, **own_sampling},
        gen_length=own.get("gen_length", gen_length),
        results=entry.results,
        given=tuple(sorted(gone_before)),
        note=entry.note,
    )


def _others(own: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str) -> list[str]:
    """The names of the own settings that have another value than theirs."""
    return [f"{prefix}{key}" for key, value in own.items() if key != "seed" and theirs[key] != value]


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Eight figures that stand for settings: another value of any of them gives others."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _given(settings: Any, prefix: str, config: BenchmarkConfig) -> dict[str, Any]:
    """Those of the settings that were given by hand."""
    default, values = type(settings)(), asdict(settings)
    return {
        f.name: values[f.name]
        for f in fields(settings)
        if values[f.name] != getattr(default, f.name) or prefix + f.name in config.given
    }


def check_given(given: Sequence[str]) -> None:
    """Raise UserError for a name that is no setting."""
    for name in given:
        require(
            name in _SETTABLE,
            f"benchmarks: given names {name!r}, which is no setting; {hint(name, _SETTABLE)}",
        )


def given_settings(words: Sequence[str]) -> tuple[str, ...]:
    """The settings that a command line gives, as `BenchmarkConfig.given` has them."""
    given = set()
    for word in words:
        option = word.split("=")[0].removeprefix("--").removeprefix("benchmarks.").replace("-", "_")
        # A switch is turned off by its name with "no" before it.
        path, dot, last = option.rpartition(".")
        given |= (
            {option, f"{path}{dot}{last.removeprefix('no_')}"} & set(_SETTABLE)
            if word.startswith("--")
            else set()
        )
    return tuple(sorted(given))


_SETTABLE = (
    *("num_fewshot", "chat", "gen_length"),
    *(f"score.{f.name}" for f in fields(ScoreConfig)),
    *(f"sampling.{f.name}" for f in fields(SamplingConfig)),
)
