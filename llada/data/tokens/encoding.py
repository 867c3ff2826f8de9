"""Documents to tokens: what each of them adds to its split, a batch at a time beside the reading of the next one."""

from __future__ import annotations

import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llada.data.batching import batches
from llada.data.document import Document, prompt_answer_pairs
from llada.data.outcomes import KEPT, Report
from llada.data.tokens.chat import NO_WORDS, TooLong, encode_example
from llada.data.tokens.fidelity import compare, is_sampled
from llada.data.tokens.packing import Kind
from llada.tokenizer import encode_texts, holds_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Turns = Literal["all", "random"]

# Characters in one call: the tokenizers library takes about 100 bytes for each, and the caches are small.
ENCODED_CHARS = 1 << 18


@dataclass(frozen=True)
class Encoder:
    """How a document becomes tokens: plain text whole; a dialogue as an example for each of its answers, or for one of them,
    or whole."""

    tokenizer: PreTrainedTokenizerFast
    kind: Kind
    row_length: int
    too_long: TooLong
    turns: Turns = "all"
    seed: int = 0
    """Of the drawn turns."""

    def encode(self, documents: list[Document]) -> list[list[Any]]:
        """For each document its items of a `RowLayout`: one array uint32 (tokens,) that ends in EOS, or for kind "sft" the
        dialogue's examples; instead of one that cannot be, the reason (`encode_example`)."""
        if self.kind == "pretrain":
            encoded = encode_texts(self.tokenizer, [document.text for document in documents])
            return [[self._row(ids)] for ids in encoded]
        if self.kind == "unified":
            return [[self._dialogue(document)] for document in documents]
        return [self._examples(document) for document in documents]

    def _row(self, ids: list[int]) -> Any:
        if not holds_words(self.tokenizer, ids):
            return NO_WORDS
        # array is three times as fast as np.array on a list.
        return np.frombuffer(array("I", [*ids, self.tokenizer.eos_token_id]), dtype=np.uint32)

    def _examples(self, document: Document) -> list[Any]:
        pairs = prompt_answer_pairs(document.messages)
        if self.turns == "random":
            # By its hash, so that the dialogue gives the same example wherever and whenever it is prepared.
            digest = blake2b(document.text.encode(), digest_size=8, key=f"turn {self.seed}".encode()).digest()
            pairs = [pairs[int.from_bytes(digest, "little") % len(pairs)]]
        return [
            encode_example(
                self.tokenizer,
                history,
                answer,
                tools=document.tools,
                row_length=self.row_length,
                too_long=self.too_long,
            )
            for history, answer in pairs
        ]

    def _dialogue(self, document: Document) -> Any:
        """All up to the last answer that is to be learned, and EOS."""
        history, answer = prompt_answer_pairs(document.messages)[-1]
        whole = encode_example(self.tokenizer, history, answer, tools=document.tools, row_length=sys.maxsize)
        return whole if isinstance(whole, str) else np.array(whole.tokens, dtype=np.uint32)


def encode(
    documents: Iterable[Document], encoder: Encoder, report: Report
) -> Iterator[tuple[Document, list[Any]]]:
    """The documents that can be, each with its items; the report learns what was kept, what could not be, and what the
    tokenizer made of a sample."""
    for number, (document, items) in enumerate(_beside(documents, encoder, report)):
        if is_sampled(number, document.text):
            report.add_tokenizer(compare(encoder.tokenizer, document.text))
        fitting = [item for item in items if not isinstance(item, str)]
        reasons = Counter(item for item in items if isinstance(item, str))
        if not fitting:
            report.add(reasons.most_common(1)[0][0], document)
            continue
        for reason, count in reasons.items():
            report.add_edits(f"examples_{reason.removeprefix('example_')}", count)
        report.add(KEPT, document)
        tokens = fitting
        if encoder.kind == "sft":
            report.add_edits("truncated_prompts", sum(example.is_truncated for example in fitting))
            tokens = [example.tokens for example in fitting]
        report.add_length("tokens", sum(map(len, tokens)))
        yield document, fitting


def _beside(
    documents: Iterable[Document], encoder: Encoder, report: Report
) -> Iterator[tuple[Document, list[Any]]]:
    """Each document with its items. A batch is encoded while the next one is read, which hides the waiting for a store,
    and in a thread of its own: a thread has its own memory arena, and among what a process has allocated before the
    tokenizers library is a tenth slower (measured with glibc)."""

    def run(batch: list[Document]) -> tuple[list[list[Any]], float]:
        begun = time.thread_time()
        return encoder.encode(batch), time.thread_time() - begun

    def finish(
        batch: list[Document], future: Future[tuple[list[list[Any]], float]]
    ) -> Iterator[tuple[Document, list[Any]]]:
        encoded, seconds = future.result()
        report.add_seconds("tokenise", seconds)
        yield from zip(batch, encoded, strict=True)

    with ThreadPoolExecutor(1) as thread:
        running: tuple[list[Document], Future[tuple[list[list[Any]], float]]] | None = None
        for batch in batches(documents, lambda document: document.size, ENCODED_CHARS):
            ready, running = running, (batch, thread.submit(run, batch))
            if ready:
                yield from finish(*ready)
        if running:
            yield from finish(*running)
