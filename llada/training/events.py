"""What a training run says of itself, in this order: RunStarted, CheckpointSkipped where one is damaged, then StepDone, StepSkipped, Validated, Sampled and CheckpointDue as they
come; RolledBack, and RunStarted again.

As JSON, an event is {"event": its name, …its fields} (`event_to_json`): a line of metrics.jsonl. Losses are nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, get_args


@dataclass(frozen=True)
class RunStarted:
    """The network is built and filled; after a restart it comes again, and after a return to a checkpoint."""

    name: ClassVar[str] = "start"
    first_step: int
    """Steps that are done already."""
    num_steps: int
    parameters: int
    unigram_loss: float
    """Unigram cross-entropy of the validation tokens: what knowing nothing but frequencies gives."""
    precision: str
    """torch's name of the compute dtype."""
    workers: int


@dataclass(frozen=True)
class StepDone:
    """The last step of a log interval is done; `loss` is the interval's mean, the rest is of its end."""

    name: ClassVar[str] = "step"
    step: int
    """Steps done."""
    loss: float
    lr: float
    grad_norm: float
    """Global norm before clipping."""
    tokens: int
    """Trained on so far."""
    tokens_per_second: float
    """Of all workers; this and what follows since the last logged step."""
    mfu: float
    """Model FLOPs utilisation, in [0, 1]."""
    tokens_per_second_per_worker: float = 0.0
    data_wait: float = 0.0
    """Share of the time in which worker 0 waited for its next batch, in [0, 1]."""
    allocated_gib: float = 0.0
    """The most that tensors took on worker 0's GPU; on a CPU its process, since it has begun."""
    reserved_gib: float = 0.0
    """The most that torch took on worker 0's GPU."""
    skipped_steps: int = 0
    """All of the run so far whose loss or gradient was no finite number."""
    noise_nats: tuple[float, ...] = ()
    """The interval's mean −log p of a masked token, for each tenth of mask probabilities (0 where there was none); not
    weighted. Empty where nothing is masked."""
    noise_tokens: tuple[int, ...] = ()
    """How many these are."""


@dataclass(frozen=True)
class StepSkipped:
    """The loss or its gradient was no finite number: the weights have not moved."""

    name: ClassVar[str] = "step_skipped"
    step: int
    loss: float
    grad_norm: float


@dataclass(frozen=True)
class RolledBack:
    """Too many steps in a row were skipped: the run goes on from its last checkpoint."""

    name: ClassVar[str] = "rolled_back"
    step: int
    """Of the checkpoint."""
    diverged_at: int
    """The last step that was skipped."""
    lr_scale: float
    """What the scheduled learning rates are multiplied with from now on."""


@dataclass(frozen=True)
class Validated:
    """The validation bound after `step` steps."""

    name: ClassVar[str] = "validation"
    step: int
    loss: float
    ratio: float
    """loss / unigram_loss."""
    averaged: bool = False
    """Of the exponential moving average of the weights."""


@dataclass(frozen=True)
class Sampled:
    """What the network writes after `step` steps."""

    name: ClassVar[str] = "samples"
    step: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class CheckpointDue:
    """A checkpoint is about to be complete: a record of events must never be behind a checkpoint. If the sink raises, there
    will be none."""

    name: ClassVar[str] = "checkpoint"
    step: int


@dataclass(frozen=True)
class CheckpointSkipped:
    """A checkpoint is not whole: the run goes on from an older one, or from the start."""

    name: ClassVar[str] = "skipped"
    step: int
    reason: str
    """Names its file."""


@dataclass(frozen=True)
class CheckpointFailed:
    """A checkpoint could not be written, or older ones not be deleted; training goes on, and the next one is written when it
    is due."""

    name: ClassVar[str] = "checkpoint_failed"
    step: int
    reason: str


Event = (
    RunStarted
    | CheckpointSkipped
    | StepDone
    | StepSkipped
    | RolledBack
    | Validated
    | Sampled
    | CheckpointDue
    | CheckpointFailed
)
EventSink = Callable[[Event], None]
"""What a training loop tells its events to."""

_KINDS: dict[str, type[Event]] = {kind.name: kind for kind in get_args(Event)}


def event_to_json(event: Event) -> dict[str, Any]:
    """An event as a JSON object; "nan", "inf" and "-inf" stand for the numbers that JSON does not have."""
    return {"event": event.name} | {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(event).items()
    }


def event_from_json(values: Mapping[str, Any]) -> Event:
    """The inverse of `event_to_json`."""
    fields: dict[str, Any] = {
        name: tuple(value)
        if isinstance(value, list)
        else float(value)
        if value in ("nan", "inf", "-inf")
        else value
        for name, value in values.items()
    }
    if "texts" in fields:
        fields["texts"] = tuple(fields["texts"])
    return _KINDS[fields.pop("event")](**fields)
