"""Files of texts that a separator divides, plain or compressed, read in pieces or as a whole: the base of readers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llada.data.outcomes import Rejects
from llada.data.read.compression import decompressor as new_decompressor
from llada.data.read.compression import is_damage, split_compression
from llada.data.read.parts import Part
from llada.files import open_bytes

_READ_BYTES = 1 << 18
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_texts(part: Part, separator: bytes, max_bytes: int, rejects: Rejects) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of what stands between separators in a part; nothing but white space is passed over.

    Rejected: texts of more than `max_bytes` ("too_large"), bytes that are no UTF-8 ("not_utf8"), and the rest of a
    compressed file from where it is damaged ("damaged_file") or ends too early ("truncated_file").
    """
    for number, data in enumerate(_split(_chunks(part, rejects), separator, part, max_bytes), 1):
        if data is None:
            rejects.add("too_large", part.label, number)
            continue
        if number == 1 and part.start == 0:
            data = data.removeprefix(_BYTE_ORDER_MARK)
        if not data.strip():
            continue  # an empty line, or what follows the last separator, is no record
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            rejects.add("not_utf8", part.label, number, data)
            continue
        yield number, text


def _chunks(part: Part, rejects: Rejects) -> Iterator[bytes | None]:
    """The bytes of a part from its start to the end of the file; a final None says that the file is damaged there."""
    compression = split_compression(part.file.url)[1]
    with open_bytes(part.file.url, part.start) as stream:
        if compression is None:
            while data := stream.read(_READ_BYTES):
                yield data
            return
        decompressor: Any = None
        try:
            while data := stream.read(_READ_BYTES):
                while data:  # one file may hold several compressed members
                    if decompressor is None:
                        decompressor = new_decompressor(compression)
                    yield decompressor.decompress(data)
                    data = decompressor.unused_data if decompressor.eof else b""
                    if decompressor.eof:
                        decompressor = None
        except Exception as error:
            if not is_damage(error):
                raise
            rejects.add("damaged_file", part.label, 0, f"{compression} error: {error}")
            yield None
            return
        if decompressor is not None:
            rejects.add("truncated_file", part.label, 0, f"the {compression} stream ends before its end mark")
            yield None


def _split(
    chunks: Iterator[bytes | None], separator: bytes, part: Part, max_bytes: int
) -> Iterator[bytes | None]:
    """Cut a byte stream at `separator`; None stands for a record of more than `max_bytes`.

    Only records that start in [part.start, part.end) are given. The unfinished record of a damaged stream is dropped.
    """
    buffer = bytearray()  # of the record being collected
    position = part.start  # where that starts in the file
    skipped = 0  # bytes already thrown away of a record that is too large
    # A piece starts inside a record of the piece before it, unless a separator precedes it.
    foreign = part.start > 0
    if foreign:
        with open_bytes(part.file.url, part.start - len(separator)) as stream:
            foreign = stream.read(len(separator)) != separator
    for chunk in chunks:
        if chunk is None:
            return
        search_from = max(0, len(buffer) - len(separator) + 1)  # the separator may lie across two chunks
        buffer += chunk
        begin = 0
        while (end := buffer.find(separator, max(search_from, begin))) >= 0:
            if part.end is not None and position >= part.end:
                return
            if not foreign:
                yield None if skipped or end - begin > max_bytes else bytes(buffer[begin:end])
            position += skipped + end + len(separator) - begin
            begin, skipped, foreign = end + len(separator), 0, False
        del buffer[:begin]
        if len(buffer) > max_bytes + len(separator):
            surplus = len(buffer) - len(separator) + 1
            skipped += surplus
            del buffer[:surplus]
    if not foreign and (buffer or skipped) and (part.end is None or position < part.end):
        yield None if skipped or len(buffer) > max_bytes else bytes(buffer)
