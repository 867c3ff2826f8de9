"""From the events of a request to OpenAI's JSON objects: one whole, or a chunk for each event."""

from __future__ import annotations

import itertools
import json
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import orjson

from llada.sampling.events import Draft, Finished, Text, Token
from pipelines.serving.dialects.body import SamplingBody
from pipelines.serving.events import Written


class ReplyWriter(ABC):
    """Writes one reply. A dialect says what its objects are called and how a text sits in them; one that is built
    otherwise overrides `whole`, `chunks`, `closing_chunks`, `frame` and `end_of_stream`.
    """

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    end_of_stream: ClassVar[str] = "data: [DONE]\n\n"
    tells_end: ClassVar[bool] = False
    """Whether the end token has a log-probability among the others."""

    def __init__(self, body: SamplingBody, model_id: str) -> None:
        self.body = body
        self.system_fingerprint: str | None = None
        self.run_id: str | None = None
        """The MLflow run of the checkpoint that answers: part of the id, by which `llada lineage` finds it."""
        self._number = uuid.uuid4().hex
        self._created = int(time.time())
        self._model_id = model_id
        self._texts: dict[int, list[str]] = {}
        self._tokens: dict[int, list[Token]] = {}
        self._ends: dict[int, Finished] = {}

    @abstractmethod
    def message(self, text: str) -> dict[str, Any]:
        """The text in a whole reply's choice."""

    def first_delta(self) -> dict[str, Any] | None:
        """In the chunk before a choice's first text; None: there is no such chunk."""
        return None

    @abstractmethod
    def delta(self, text: str) -> dict[str, Any]:
        """More text in a chunk's choice."""

    @abstractmethod
    def no_delta(self) -> dict[str, Any]:
        """In a chunk without text: a draft, or why a choice ended."""

    def logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        """What a choice says of its tokens, or of further ones, where the body's `num_top` is a number; {}: the dialect has none."""
        return {}

    def add(self, event: Written) -> None:
        """Collect an event for `whole`."""
        if isinstance(event, Text):
            self._texts.setdefault(event.index, []).append(event.text)
            self._tokens.setdefault(event.index, []).extend(event.tokens)
        elif isinstance(event, Finished):
            self._ends[event.index] = event

    def restart(self) -> None:
        """Forget what was collected: the reply begins anew."""
        self._texts.clear()
        self._tokens.clear()
        self._ends.clear()

    def whole(self) -> dict[str, Any]:
        """The reply to a request that does not stream."""
        choices = []
        for index, end in sorted(self._ends.items()):
            message = self.message("".join(self._texts.get(index, [])))
            tokens = self._told([*self._tokens.get(index, []), *self._end_of(end)])
            logprobs = self._logprobs(index, tokens)
            choices.append(
                {
                    "index": index,
                    **message,
                    "logprobs": logprobs,
                    "finish_reason": end.reason,
                    **self._trace(index),
                }
            )
        return {**self._head(self.whole_object), "choices": choices, **self._totals()}

    def chunks(self, event: Written) -> list[dict[str, Any]]:
        """The chunks that an event of a streamed reply becomes."""
        chunks = []
        if isinstance(event, Text | Draft | Finished) and event.index not in self._texts:
            self._texts[event.index] = []
            if (first := self.first_delta()) is not None:
                chunks.append(self._chunk(event.index, first))
        self.add(event)
        if isinstance(event, Text):
            tokens = self._told(event.tokens)
            logprobs = self._logprobs(event.index, tokens) if tokens else None
            if event.text or logprobs:
                chunks.append(self._chunk(event.index, self.delta(event.text), logprobs=logprobs))
        elif isinstance(event, Draft):
            chunks.append(self._chunk(event.index, self.no_delta()) | {"draft": draft_object(event)})
        elif isinstance(event, Finished):
            end = self._end_of(event)
            logprobs = self._logprobs(event.index, end) if end else None
            chunks.append(self._chunk(event.index, self.no_delta(), event.reason, logprobs))
        return chunks

    def closing_chunks(self) -> list[dict[str, Any]]:
        """What follows the last event: the usage, for those who asked for it."""
        if not self.body.stream_options.include_usage:
            return []
        return [{**self._head(self.chunk_object), "choices": [], **self._totals()}]

    def frame(self, chunk: dict[str, Any]) -> str:
        """A chunk, or an error object, as a server-sent event. That of a draft has a name, by which a browser's EventSource
        passes it over."""
        name = "event: draft\n" if "draft" in chunk else ""
        return f"{name}data: {to_json(chunk).decode()}\n\n"

    def _chunk(
        self,
        index: int,
        part: dict[str, Any],
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        trace = {} if reason is None else self._trace(index)
        choice = {"index": index, **part, "logprobs": logprobs, "finish_reason": reason, **trace}
        usage = {"usage": None} if self.body.stream_options.include_usage else {}
        return {**self._head(self.chunk_object), "choices": [choice], **usage}

    def _end_of(self, event: Finished) -> Sequence[Token]:
        return [event.end] if self.tells_end and event.end is not None else []

    def _told(self, tokens: Sequence[Token]) -> Sequence[Token]:
        """Those that belong to the text: what fills the places of a schema up does not."""
        if self.body.json_schema is None:
            return tokens
        return [token for token in tokens if not token.is_special]

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return None if self.body.num_top is None else self.logprobs(index, tokens)

    def _trace(self, index: int) -> dict[str, Any]:
        """What else a choice says of its tokens, where it was asked for."""
        tokens = self._tokens.get(index, [])
        trace = {"trace": trace_object(tokens)} if self.body.include_trace else {}
        return trace | ({"gaps": _gaps(tokens, self.body.num_gaps)} if self.body.has_gaps else {})

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": "-".join(filter(None, [self.id_prefix, self.run_id, self._number])),
            "object": kind,
            "created": self._created,
            "model": self._model_id,
            "system_fingerprint": self.system_fingerprint,
        }

    def _totals(self) -> dict[str, Any]:
        """OpenAI's usage, and what it took: forwards of the network, and tokens for each of them."""
        ends = self._ends.values()
        prompt, completion = sum(e.prompt_tokens for e in ends), sum(e.completion_tokens for e in ends)
        nfe = sum(e.nfe for e in ends)
        return {
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            },
            "denoising": {
                "forwards": nfe,
                "tokens_per_forward": round(completion / nfe, 3) if nfe else 0.0,
            },
        }


def to_json(content: Any) -> bytes:
    try:
        return orjson.dumps(content)
    except (
        TypeError
    ):  # a schema that is echoed may hold integers of more than 64 bits, or be nested more than 254 deep
        return json.dumps(content, ensure_ascii=False).encode()


def draft_object(draft: Draft) -> dict[str, Any]:
    """A draft in the answer; see `Draft`."""
    return {
        "forwards": draft.forwards,
        "block": draft.block,
        "tokens": draft.tokens,
        "steps": draft.steps,
        "confidences": [_rounded(sure) for sure in draft.confidences],
    }


def trace_object(tokens: Sequence[Token]) -> dict[str, Any]:
    """How a reply came to be, token by token; see `Token`."""
    sure = (None if token.logprob is None else math.exp(token.logprob) for token in tokens)
    return {
        "tokens": [token.text for token in tokens],
        "token_ids": [token.id for token in tokens],
        "blocks": [token.block for token in tokens],
        "steps": [token.step for token in tokens],
        "confidences": [_rounded(each) for each in sure],
    }


def _gaps(tokens: Sequence[Token], number: int) -> list[str]:
    """The texts of what was not given, of those behind a reply's end an empty one."""
    runs = itertools.groupby(tokens, lambda token: token.step is not None)
    filled = (b"".join(token.raw for token in run if not token.is_special) for is_gap, run in runs if is_gap)
    texts = [raw.decode("utf-8", errors="replace") for raw in filled]
    return texts + [""] * (number - len(texts))


def _rounded(probability: float | None) -> float | None:
    return None if probability is None else round(probability, 6)
