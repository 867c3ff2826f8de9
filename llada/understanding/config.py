"""How a head is fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llada.settings import check_limits, limited

Pooling = Literal["mean", "first", "last"]
Target = Literal["class", "score"]


@dataclass(frozen=True)
class UnderstandingConfig:
    """Labelled texts that the checkpoint is fine-tuned on, and others that it then judges (the task "understanding")."""

    train: str | None = None
    """JSON lines with a text and its label."""
    test: str | None = None
    text_field: str = "text"
    pair_field: str | None = None
    """Of a second text, where a label is about two (as in MNLI)."""
    label_field: str = "label"
    target: Target = "class"
    """Labels are names or numbers of classes; or "score": numbers to come near to (as in STS-B)."""
    pooling: Pooling = "mean"
    """What of the last layer the head reads: the mean over the text, or what stands at its first position, for which the tokenizer's
    beginning (BOS or CLS) is put there, as BERT has it; or at its last, an EOS, all that an autoregressive network has seen."""
    max_length: int | None = limited(None, low=4)
    """Tokens of a row; longer texts lose their ends. None: the checkpoint's context."""
    num_epochs: float = limited(3.0, above=0)
    batch_rows: int = limited(32, low=1)
    lr: float = limited(5e-5, above=0)
    """AdamW's peak, behind a linear warm-up and before a linear fall to 0."""
    warmup_fraction: float = limited(0.06, low=0, high=1)
    weight_decay: float = limited(0.01, low=0)
    seeds: int = limited(3, low=1)
    """Fine-tunings, each with a head and an order of its own: their mean counts."""

    def __post_init__(self) -> None:
        check_limits(self, "understanding")
