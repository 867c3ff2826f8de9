"""Which split a document belongs to: by its own hash, whatever stands around it."""

from __future__ import annotations

import hashlib

from llada.data.document import Document

SPLITS = ("train", "validation")


def split_of(document: Document, validation_fraction: float, seed: int) -> str:
    """The split of a document; of a dialogue by what opens it: several answers to one question must not fall into
    different splits."""
    questions = (message["content"] for message in document.messages if message["role"] == "user")
    text = next(questions, document.text)
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return "validation" if int.from_bytes(digest, "little") / 2**64 < validation_fraction else "train"
