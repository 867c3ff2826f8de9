"""What a task of lm_eval asks for where a text is to be written (`generation_kwargs`), in settings of ours."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypedDict

from llada.errors import UserError
from llada.evals.autoregressive.writing import check_writing
from llada.sampling.config import SamplingConfig
from llada.sampling.rules import temperature_of
from llada.settings import from_dict, hint

_log = logging.getLogger(__name__)
# lm_eval's names of a length, of which the first that is there counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Of a task that says nothing about it, as in lm_eval's own models.
_GEN_LENGTH = 256
# Of a gap, which is one block unless its settings say otherwise.
_GAP_BLOCK = 1024


class Gap(TypedDict):
    """The wish "gap": the text stands between the prompt and what follows it. Fields of a document."""

    suffix: str
    """What follows."""
    answer: str
    """A text that is right there: where no length is given, there are as many masks as it has tokens."""


@dataclass(frozen=True)
class Writer:
    """How texts are written where a task says nothing else."""

    sampling: Mapping[str, Any]
    """Settings of SamplingConfig; those that a task asks for go before them."""
    gen_length: int | None
    """Goes before what a task asks for."""
    context: int
    """Of the checkpoint."""
    is_causal: bool = False
    """Whether it writes from left to right."""

    def __post_init__(self) -> None:
        given = {"gen_length": self.gen_length} if self.gen_length else {}
        from_dict(SamplingConfig, {**self.sampling, **given}, "sampling.")

    def settings(self, wishes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The sampling settings and stop strings of a request that asks for this; "gap" is a wish beside them (`Gap`).

        As in lm_eval's own models (its `normalize_gen_kwargs`) a temperature above 0 alone asks for tokens to be drawn, and with
        `do_sample: false` none are, whatever stands beside it, which is a warning.

        Raises UserError for a wish that nothing here can grant, and for an answer beside which no prompt fits the context.
        """
        wishes = dict(wishes)
        has_gap = wishes.pop("gap", None) is not None
        if has_gap and self.is_causal:
            raise UserError(
                "lm_eval: the checkpoint is autoregressive and sees nothing behind a gap, which the task asks it to fill"
            )
        until = wishes.pop("until", None) or []
        stop = [until] if isinstance(until, str) else until
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str | None) for text in stop):
            raise UserError(
                f"lm_eval: a task asks for until={until!r:.60}, which is no text and no list of texts"
            )
        lengths = [wishes.pop(name, None) for name in _LENGTHS]
        length = next((value for value in lengths if value is not None), _GEN_LENGTH)
        asked, is_warm = wishes.pop("do_sample", None), wishes.get("temperature") not in (None, 0)
        is_sampled = is_warm if asked is None else bool(asked)
        warmth: dict[str, Any] = {
            name: wishes.pop(name) for name in ("temperature", "top_p", "top_k", "min_p") if name in wishes
        }
        own = {field.name for field in fields(SamplingConfig)}
        for name in wishes:
            if name not in own:
                raise UserError(
                    f"lm_eval: the task or --gen_kwargs asks for {name}={wishes[name]!r}, which this sampler has not; "
                    f"{hint(name, own)}"
                )
        sampling: dict[str, Any] = {
            **({"block_length": _GAP_BLOCK} if has_gap else {}),
            **self.sampling,
            "gen_length": self.gen_length or length,
            **(warmth if is_sampled else {}),
            **wishes,
        }
        config = from_dict(SamplingConfig, sampling, "sampling.")
        if is_warm and not is_sampled:
            _warn_once(
                f"a task of lm_eval asks for do_sample={asked} at a temperature of {warmth['temperature']}: nothing is drawn"
            )
        elif is_sampled and temperature_of(config) == 0:
            _warn_once(
                f"a task of lm_eval asks for do_sample={asked} without a temperature: nothing is drawn"
            )
        if self.is_causal:
            check_writing(config, "lm_eval: the checkpoint")
        settings = asdict(config)
        if settings["gen_length"] >= self.context:
            raise UserError(
                f"lm_eval: {settings['gen_length']} tokens of an answer leave no room for a prompt in the context of "
                f"{self.context}; give a smaller benchmarks.gen_length, or gen_length to lm_eval"
            )
        return settings, [text for text in stop if text is not None]


@functools.cache
def _warn_once(text: str) -> None:
    """Each request of a task asks for the same."""
    _log.warning(text)
