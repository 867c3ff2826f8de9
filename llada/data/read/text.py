"""Plain text: a file is one text, or several with <|endoftext|> between them."""

from __future__ import annotations

from collections.abc import Iterator

from llada.data.outcomes import Rejects
from llada.data.read.parts import Part, Reader, ReadOptions, Record
from llada.data.read.stream import read_texts

_SEPARATOR = b"<|endoftext|>"


def read_text(part: Part, options: ReadOptions, rejects: Rejects) -> Iterator[Record]:
    """The texts of a part, each as {"text": ...}; when texts are to be cut anyway, too large ones come in pieces.
    Rejected is what `read_texts` rejects."""
    texts = read_texts(
        part,
        _SEPARATOR,
        options.max_record_bytes,
        rejects,
        encoding=options.encoding,
        cuts=options.cuts_texts,
    )
    for number, text in texts:
        yield Record({"text": text}, number)


TEXT = Reader((".txt",), read_text, is_compressible=True, text_field="text")
