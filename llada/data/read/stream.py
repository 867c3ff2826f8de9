"""Files of texts that a separator divides, plain or compressed, read in pieces or as a whole: the base of readers."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from itertools import chain

from llada.data.outcomes import Rejects
from llada.data.read.compression import SOUND, Damage, Piece, decompressed, split_compression
from llada.data.read.parts import Part
from llada.files import open_bytes

_READ_BYTES = 1 << 18
_MARKS = {
    "utf-32-le": codecs.BOM_UTF32_LE,  # it begins as that of UTF-16 does
    "utf-32-be": codecs.BOM_UTF32_BE,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
}
_ASCII = "<|endoftext|>\n"
_MARK_UNDECODABLE = "llada.mark_undecodable"
codecs.register_error(_MARK_UNDECODABLE, lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]

ENCODINGS = ("utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "cp1250", "cp1251", "koi8-r",
             "gb18030", "big5", "shift_jis", "euc-jp", "euc-kr")  # fmt: skip
"""Some that Python knows."""


def is_encoding(name: str) -> bool:
    """Whether Python knows an encoding of text by this name."""
    try:
        "".encode(name)
    except (LookupError, ValueError):  # it also knows rot13
        return False
    return True


def read_texts(
    part: Part,
    separator: bytes,
    max_bytes: int,
    rejects: Rejects,
    *,
    encoding: str | None = None,
    opening: bytes = b"",
    cuts: bool = False,
    with_blank: bool = False,
) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of what stands between separators in a part; nothing but white space is passed over.

    Rejected: texts of more than `max_bytes` ("too_large"), bytes that are no UTF-8 ("not_utf8") or mean nothing in
    another encoding ("undecodable"), and what is lost where a compressed file is broken: the reasons of `Damage`.

    Args:
        separator: in ASCII.
        encoding: of the file; None is UTF-8. One that does not spell ASCII as ASCII does, such as UTF-16, cannot be cut: the part
            that begins the file reads all of it.
        opening: what every text begins with, if anything. It tells the first text behind damage from the tail of one
            that began in what is lost; without it that text is given up.
        cuts: give a text of more than `max_bytes` in several, cut at empty lines or, failing that, at line ends.
        with_blank: give what is nothing but white space too.
    """
    encoding = encoding or "utf-8"
    is_utf8 = codecs.lookup(encoding).name == "utf-8"
    end = part.end
    is_wide = _ASCII.encode(encoding) != _ASCII.encode()
    if is_wide and part.start > 0:
        return
    pieces, encoding = _marked(part, encoding, rejects)
    # Only of UTF-8 is it known where a character begins.
    if is_wide or (cuts and not is_utf8):
        end, pieces, encoding = None, _as_utf8(pieces, encoding), "utf-8"
    records = _Records(separator, max_bytes, part, end, opening, cuts)
    for number, data in enumerate(_cut(pieces, records, part.label, rejects), 1):
        if data is None:
            rejects.add("too_large", part.label, number)
            continue
        if number == 1 and part.start == 0 and encoding == "utf-8":
            data = data.removeprefix(codecs.BOM_UTF8)
        if not with_blank and not data.strip():
            continue  # an empty line, or what follows the last separator, is no record
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            rejects.add("not_utf8" if is_utf8 else "undecodable", part.label, number, data)
            continue
        yield number, text


def read_characters(part: Part, rejects: Rejects, encoding: str | None = None) -> Iterator[str | None]:
    """The characters of a whole file in pieces, a None where some are lost. Bytes that mean nothing become surrogates.

    Rejected is what is lost where a compressed file is broken: the reasons of `Damage`.
    """
    pieces, encoding = _marked(part, encoding or "utf-8", rejects)
    decoder = codecs.getincrementaldecoder(encoding)(_MARK_UNDECODABLE)
    for piece in pieces:
        if isinstance(piece, bytes):
            yield decoder.decode(piece)
        elif isinstance(piece, Damage):
            yield decoder.decode(piece.unproven)
            why = f"{piece.detail}; what was read before may be altered" if piece.unproven else piece.detail
            rejects.add_fault(piece.reason, part.label, why)
            decoder.reset()
            if piece.reason != "trailing_garbage":
                yield None
    yield decoder.decode(b"", final=True)


def _marked(part: Part, encoding: str, rejects: Rejects) -> tuple[Iterator[Piece], str]:
    """The bytes of a part, and the encoding that their byte order mark makes of "utf-16" and "utf-32"; none of a file
    whose mark is that of another encoding or is missing, which is rejected."""
    pieces = _pieces(part)
    name = codecs.lookup(encoding).name
    if part.start > 0 or name not in ("utf-8", "utf-16", "utf-32"):
        return pieces, encoding
    first: list[Piece] = []
    for piece in pieces:
        first.append(piece)
        if isinstance(piece, bytes):
            break
    head = first[-1] if first and isinstance(first[-1], bytes) else b""
    marked = [wide for wide, mark in _MARKS.items() if head.startswith(mark)]
    meant = [wide for wide in marked if wide.startswith(name)]
    if name == "utf-8" and marked:
        kind = marked[0].rpartition("-")[0]
        reason = "not_utf8"
        problem = f"it begins with the byte order mark of {kind.upper()}: set read.encoding to {kind}"
    elif name != "utf-8" and head and not meant:
        reason = "undecodable"
        problem = f"it begins without a byte order mark: set read.encoding to {name}-le or {name}-be"
    elif meant:
        return chain([*first[:-1], head.removeprefix(_MARKS[meant[0]])], pieces), meant[0]
    else:
        return chain(first, pieces), encoding
    rejects.add_fault(reason, part.label, problem, line=1)
    return iter([piece for piece in first if isinstance(piece, Damage)]), "utf-8"


def _pieces(part: Part) -> Iterator[Piece]:
    """The bytes of a part from its start to the end of the file, decompressed."""
    compression = split_compression(part.file.url)[1]
    with open_bytes(part.file.url, part.start) as stream:
        if compression is not None:
            yield from decompressed(stream, compression)
            return
        while data := stream.read(_READ_BYTES):
            yield data


def _as_utf8(pieces: Iterable[Piece], encoding: str) -> Iterator[Piece]:
    """The same in UTF-8, in which bytes that mean nothing become one that UTF-8 does not know."""
    decoder = codecs.getincrementaldecoder(encoding)(_MARK_UNDECODABLE)
    for piece in chain(pieces, [None]):
        if piece is SOUND:
            yield piece
        elif isinstance(piece, Damage):
            yield piece._replace(unproven=_utf8(decoder.decode(piece.unproven)))
            decoder.reset()
        else:
            yield _utf8(decoder.decode(piece or b"", final=piece is None))


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _cut(pieces: Iterable[Piece], records: _Records, label: str, rejects: Rejects) -> Iterator[bytes | None]:
    """The records of a stream; None stands for one that is too large. What its damage costs goes to the rejects."""
    unproven = 0  # records given since the last SOUND
    for piece in pieces:
        if piece is SOUND:
            unproven = 0
            continue
        for record in records.add(piece.unproven if isinstance(piece, Damage) else piece):
            unproven += record is not None
            yield record
        if isinstance(piece, Damage):
            if piece.reason == "trailing_garbage":
                yield from records.finish()
            doubtful = unproven if piece.reason == "damaged_file" else 0
            rejects.add_fault(piece.reason, label, piece.detail, doubtful=doubtful)
            records.drop_unfinished()
            unproven = 0
        if records.is_over:
            return
    yield from records.finish()


class _Records:
    """What stands between separators in a part of a stream of bytes, from `part.start` in a file to `end`.

    Only records that start in the part are given; None stands for one that is too large.
    """

    def __init__(
        self, separator: bytes, max_bytes: int, part: Part, end: int | None, opening: bytes, cuts: bool
    ) -> None:
        self._separator = separator
        self._max_bytes = max_bytes
        self._end = end
        self._opening = opening
        self._cuts = cuts
        self._buffer = bytearray()  # of the record being collected
        self._position = part.start  # where that starts in the file
        self._skipped = 0  # bytes already thrown away of a record that is too large
        self._is_tail = False  # it may have begun before what is known of it
        self._tail_opening = b""  # unless it begins so
        self.is_over = False
        if part.start > 0:
            # A part starts inside a record of the one before it, unless a separator precedes it.
            with open_bytes(part.file.url, part.start - len(separator)) as stream:
                self._is_tail = stream.read(len(separator)) != separator

    def add(self, chunk: bytes) -> Iterator[bytes | None]:
        """The records that end in the next bytes of the stream."""
        separator, buffer, max_bytes = self._separator, self._buffer, self._max_bytes
        search_from = max(0, len(buffer) - len(separator) + 1)  # the separator may lie across two chunks
        buffer += chunk
        begin = 0
        while (end := buffer.find(separator, max(search_from, begin))) >= 0:
            if self._end is not None and self._position >= self._end:
                self.is_over = True
                return
            if self._is_tail or self._skipped or end - begin > max_bytes:
                yield from self._odd(bytes(buffer[begin:end]))
            else:
                yield bytes(buffer[begin:end])
            self._position += self._skipped + end + len(separator) - begin
            begin, self._skipped, self._is_tail = end + len(separator), 0, False
        del buffer[:begin]
        while len(buffer) > self._max_bytes + len(separator):
            if self._cuts:
                size = _place_to_cut(buffer, self._max_bytes)
                yield from self._odd(bytes(buffer[:size]))
                self._position += size
            else:
                size = len(buffer) - len(separator) + 1
                self._skipped += size
            del buffer[:size]

    def finish(self) -> Iterator[bytes | None]:
        """The record that ends with the stream."""
        is_behind_end = self._end is not None and self._position >= self._end
        if (self._buffer or self._skipped) and not is_behind_end:
            yield from self._odd(bytes(self._buffer))

    def drop_unfinished(self) -> None:
        """Forget the bytes of the record being collected: an unknown number of others is lost behind them."""
        self._buffer.clear()
        self._skipped = 0
        self._is_tail, self._tail_opening = True, self._opening

    def _odd(self, record: bytes) -> Iterator[bytes | None]:
        """What becomes of a record that may be a tail or too large."""
        if self._is_tail and not (self._tail_opening and record.lstrip().startswith(self._tail_opening)):
            return
        while self._cuts and len(record) > self._max_bytes:
            size = _place_to_cut(record, self._max_bytes)
            yield record[:size]
            record = record[size:]
        yield None if self._skipped or len(record) > self._max_bytes else record


def _place_to_cut(text: bytes | bytearray, max_bytes: int) -> int:
    """Where to cut a text of more than `max_bytes` bytes: behind an empty line, a line, or a character of UTF-8."""
    for mark in (b"\n\n", b"\n"):
        if (found := text.rfind(mark, max_bytes // 2, max_bytes)) >= 0:
            return found + len(mark)
    size = max_bytes
    while size > 1 and text[size] & 0xC0 == 0x80:
        size -= 1
    return size
