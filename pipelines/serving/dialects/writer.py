"""From the events of a request to OpenAI's JSON objects: one whole, or a chunk for each event."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from llada.sampling.events import Event, Finished, Text
from pipelines.serving.dialects.body import SamplingBody


class ReplyWriter(ABC):
    """Writes one reply. A dialect says what its objects are called and how a text sits in them; one that is built
    otherwise overrides `whole`, `chunks`, `closing_chunks`, `frame` and `end_of_stream`.
    """

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    end_of_stream: ClassVar[str] = "data: [DONE]\n\n"

    def __init__(self, body: SamplingBody, model_id: str) -> None:
        self.body = body
        self.system_fingerprint: str | None = None
        self._id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model_id = model_id
        self._texts: dict[int, list[str]] = {}
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
    def last_delta(self) -> dict[str, Any]:
        """In the chunk that says why a choice ended."""

    def add(self, event: Event) -> None:
        """Collect an event for `whole`."""
        if isinstance(event, Text):
            self._texts.setdefault(event.index, []).append(event.text)
        elif isinstance(event, Finished):
            self._ends[event.index] = event

    def whole(self) -> dict[str, Any]:
        """The reply to a request that does not stream."""
        choices = []
        for index, end in sorted(self._ends.items()):
            message = self.message("".join(self._texts.get(index, [])))
            choices.append({"index": index, **message, "logprobs": None, "finish_reason": end.reason})
        return {**self._head(self.whole_object), "choices": choices, **self._totals()}

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """The chunks that an event of a streamed reply becomes."""
        chunks = []
        if isinstance(event, Text | Finished) and event.index not in self._texts:
            self._texts[event.index] = []
            if (first := self.first_delta()) is not None:
                chunks.append(self._chunk(event.index, first))
        self.add(event)
        if isinstance(event, Text):
            part = self.delta(event.text)
            if event.canvas is not None:
                part["canvas"] = event.canvas
            chunks.append(self._chunk(event.index, part))
        elif isinstance(event, Finished):
            chunks.append(self._chunk(event.index, self.last_delta(), event.reason))
        return chunks

    def closing_chunks(self) -> list[dict[str, Any]]:
        """What follows the last event: the usage, for those who asked for it."""
        if not self.body.stream_options.include_usage:
            return []
        return [{**self._head(self.chunk_object), "choices": [], **self._totals()}]

    def frame(self, chunk: dict[str, Any]) -> str:
        """A chunk, or an error object, as a server-sent event."""
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    def _chunk(self, index: int, part: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, **part, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self.body.stream_options.include_usage else {}
        return {**self._head(self.chunk_object), "choices": [choice], **usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
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
