"""Compressed files: which compression a name promises, and what was compressed, member (stream, frame) by member.

    for piece in decompressed(stream, "gzip"): ...      bytes, SOUND or a Damage

Damage costs what it damages: all that was decompressed before it is given, and reading goes on at the next member
that can be decompressed. Zeros behind a member are padding, as gzip and xz themselves take them.
"""

from __future__ import annotations

import bz2
import lzma
import os
import re
import struct
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, BinaryIO, Final, Literal, NamedTuple, TypeAlias

from llada.errors import UserError

_READ_BYTES = 1 << 17  # small: a member may expand a thousandfold
_HELD_BYTES = 1 << 20  # of a damaged member: the start of the next one is searched in them
_PROOF_BYTES = 1 << 16  # what bytes that only look like a member hardly ever expand to
_MAX_WINDOW_BYTES = 1 << 31  # as zstd --long=31 asks for
_MAX_DICTIONARY_BYTES = 1 << 27
_SKIPPABLE_FRAMES = tuple(struct.pack("<I", 0x184D2A50 + number) for number in range(16))
_DICTIONARY_FRAME = _SKIPPABLE_FRAMES[13]
_NOT_ZERO = re.compile(rb"[^\0]")


@dataclass(frozen=True)
class _Kind:
    """One way to compress: how its files are named, how its members begin, and what undoes it."""

    name: str
    suffixes: tuple[str, ...]
    magic: bytes
    """What a member begins with."""
    opener: Callable[[bytes], Callable[[], Any]]
    """(dictionary) -> () -> an object with decompress(data), eof and unused_data, for one member."""
    step: int
    """Bytes to decompress at once: a step in which damage shows gives nothing, unless the object can be copied."""
    checks_blocks: bool = False
    """Whether what it gives has passed a checksum before its member ends."""
    empty_magics: tuple[bytes, ...] = ()
    """What members without content begin with."""


def _zstd(dictionary: bytes) -> Callable[[], Any]:
    try:
        import zstandard
    except ImportError:
        raise UserError("reading .zst files needs the package zstandard: pip install zstandard") from None
    given = zstandard.ZstdCompressionDict(dictionary) if dictionary else None
    return zstandard.ZstdDecompressor(dict_data=given, max_window_size=_MAX_WINDOW_BYTES).decompressobj


_KINDS = {
    kind.name: kind
    for kind in (
        _Kind("gzip", (".gz",), b"\x1f\x8b\x08", lambda _: lambda: zlib.decompressobj(wbits=31), _READ_BYTES),
        _Kind("bzip2", (".bz2",), b"BZh", lambda _: bz2.BZ2Decompressor, 64, checks_blocks=True),
        _Kind("xz", (".xz",), b"\xfd7zXZ\0", lambda _: lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), 256),
        _Kind("zstd", (".zst", ".zstd"), b"\x28\xb5\x2f\xfd", _zstd, 1 << 12, empty_magics=_SKIPPABLE_FRAMES),
    )
}
COMPRESSIONS: dict[str, str] = {suffix: kind.name for kind in _KINDS.values() for suffix in kind.suffixes}
"""{suffix: compression}"""


class _Mark(Enum):
    SOUND = "sound"


SOUND: Final = _Mark.SOUND
"""What was given before is what was compressed: its checksum, where it has one, is right."""


class Damage(NamedTuple):
    """The compressed data break off; what is given next is of a later member."""

    reason: Literal["damaged_file", "truncated_file", "trailing_garbage", "empty_file"]
    detail: str
    unproven: bytes = b""
    """The last bytes before a "damaged_file": they, and all given since the last SOUND, may be altered."""


Piece: TypeAlias = bytes | Literal[_Mark.SOUND] | Damage


def split_compression(url: str) -> tuple[str, str | None]:
    """(the URL in lower case without its compression's suffix, None or the compression). What a web server is asked
    besides, "?signature=...", belongs to no name."""
    name = url.lower()
    if name.startswith(("http://", "https://")):
        name = name.partition("?")[0]
    stem, suffix = os.path.splitext(name)
    compression = COMPRESSIONS.get(suffix)
    return (stem, compression) if compression else (name, None)


def decompressed(stream: BinaryIO, compression: str) -> Iterator[Piece]:
    """The content of a compressed file in pieces, a SOUND behind each sound member, a Damage where the file is broken.

    A .zst file may bring its dictionary in its first frame, as the WARC files of some crawlers do.

    Args:
        stream: read forward only, in small pieces.
        compression: one of those in `COMPRESSIONS`.
    """
    kind = _KINDS[compression]
    source = _Source(stream)
    if not source.peek(1):
        yield Damage("empty_file", f"0 bytes are no {kind.name} file; perhaps an upload failed")
        return
    try:
        new_member = kind.opener(_dictionary(source) if kind.name == "zstd" else b"")
    except Exception as error:
        if not _is_damage(error):
            raise
        yield Damage("damaged_file", f"its dictionary cannot be used: {error}")
        return
    found_any = is_guess = False  # a guess: bytes behind damage that look like the start of a member
    unreported: Damage | None = None
    while source.pass_zeros():
        if not is_guess and not source.peek(4).startswith((kind.magic[:4], *kind.empty_magics)):
            place = f"byte {source.position:,}"
            if kind.magic.startswith(source.peek(4)):
                unreported = Damage(
                    "truncated_file", f"the file ends in the first bytes of a member, at {place}"
                )
                break
            start = source.peek(16)
            unreported = Damage("damaged_file", f"there are no {kind.name} data at {place}, but {start!r}")
            is_guess = True
        if is_guess and not source.find(kind.magic):
            if unreported and found_any:
                unreported = unreported._replace(reason="trailing_garbage")
            break
        source.mark()
        outcome = yield from _member(source, kind, new_member, is_guess, unreported)
        if outcome != "none":
            unreported, found_any = None, True
        is_guess = outcome != "sound"
        if is_guess:
            source.rewind()
    if unreported:
        yield unreported


def _member(
    source: _Source, kind: _Kind, new_member: Callable[[], Any], is_guess: bool, unreported: Damage | None
) -> Generator[Piece, None, Literal["sound", "damaged", "none"]]:
    """The content of what begins at the source's mark; of a guess that proves wrong nothing is given. `unreported` is
    given before it. Returns what it was."""
    member = new_member()
    start = source.position
    pending = b""  # held back until more follows, which shows that it is whole
    while data := source.take(kind.step):
        before = member.copy() if kind.name == "gzip" else None
        try:
            content = member.decompress(data)
        except Exception as error:
            if not _is_damage(error):
                raise
            if is_guess:
                return "none"
            pending += _until_damage(before, data) if before else b""
            yield Damage("damaged_file", f"{kind.name} data from byte {start:,} on: {error}", pending)
            return "damaged"
        if is_guess:
            pending += content
            if len(pending) < _PROOF_BYTES and not member.eof:
                continue
            is_guess = False
            if unreported:
                yield unreported
        elif content:
            if pending:
                yield pending
                if kind.checks_blocks:
                    yield SOUND
            pending = content
        if member.eof:
            source.give_back(len(member.unused_data))
            if pending:
                yield pending
            yield SOUND
            return "sound"
    if is_guess and not pending:
        return "none"
    if is_guess and unreported:
        yield unreported
    if pending:
        yield pending
    yield Damage("truncated_file", f"the {kind.name} data that begin at byte {start:,} have no end")
    return "sound"


def _until_damage(member: Any, data: memoryview) -> bytes:
    """What a gzip member gives before the byte of `data` in which its damage shows."""
    content = bytearray()
    try:
        for at in range(len(data)):
            content += member.decompress(data[at : at + 1])
    except zlib.error:
        pass
    return bytes(content)


def _is_damage(error: Exception) -> bool:
    """Whether `error`, raised by a decompressor, says that the data are damaged; bz2 says it by an OSError."""
    if type(error).__name__ == "ZstdError":
        return "Allocation" not in str(error)
    return isinstance(error, zlib.error | lzma.LZMAError | OSError)


def _dictionary(source: _Source) -> bytes:
    """The dictionary that a .zst file begins with, or b"". It is compressed itself, or not."""
    if source.peek(4) != _DICTIONARY_FRAME:
        return b""
    size = int.from_bytes(source.peek(8)[4:], "little")
    dictionary = source.peek(8 + size)[8:] if size <= _MAX_DICTIONARY_BYTES else b""
    if len(dictionary) == size and dictionary.startswith(_KINDS["zstd"].magic):
        return _zstd(b"")().decompress(dictionary)
    return dictionary


class _Source:
    """The unread bytes of a stream. Those since a mark can be had back, unless they are too many."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._chunk = b""
        self._at = 0  # where in it the unread bytes begin
        self._end = 0  # of the chunk, in the stream
        self._mark = 0  # in the chunk, unless something is held
        self._held: deque[bytes] = deque()  # from the mark on

    @property
    def position(self) -> int:
        """Of the next unread byte, in the stream."""
        return self._end - len(self._chunk) + self._at

    def take(self, size: int) -> memoryview:
        """The next bytes, at most `size`; none at the end."""
        if self._at == len(self._chunk):
            self._held.append(self._chunk[self._mark :])
            while sum(map(len, self._held)) > _HELD_BYTES:
                self._held.popleft()
            self._chunk, self._at, self._mark = b"", 0, 0
            self._read_more()
        data = memoryview(self._chunk)[self._at : self._at + size]
        self._at += len(data)
        return data

    def give_back(self, size: int) -> None:
        """Take back the last `size` bytes of what `take` gave last."""
        self._at -= size

    def mark(self) -> None:
        """Remember this place."""
        self._mark = self._at
        self._held.clear()

    def rewind(self) -> None:
        """Go back to the byte behind the marked place, or as far as bytes are held."""
        if self._held:
            self._chunk = b"".join([*self._held, self._chunk])
            self._held.clear()
            self._mark = 0
        self._at = self._mark + 1

    # What follows is for places between members, where nothing needs to be had back.

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end, which stay unread."""
        while len(self._chunk) - self._at < size and self._read_more():
            pass
        return self._chunk[self._at : self._at + size]

    def pass_zeros(self) -> bool:
        """Go on to the next byte that is not zero; whether there is one."""
        while (found := _NOT_ZERO.search(self._chunk, self._at)) is None:
            self._at = len(self._chunk)
            if not self._read_more():
                return False
        self._at = found.start()
        return True

    def find(self, magic: bytes) -> bool:
        """Go on to the next place where `magic` stands; whether there is one."""
        while (found := self._chunk.find(magic, self._at)) < 0:
            self._at = max(self._at, len(self._chunk) - len(magic) + 1)
            if not self._read_more():
                return False
        self._at = found
        return True

    def _read_more(self) -> bool:
        """Read on behind the unread bytes; whether there was more."""
        data = self._stream.read(_READ_BYTES)
        self._chunk, self._at = self._chunk[self._at :] + data, 0
        self._end += len(data)
        return bool(data)
