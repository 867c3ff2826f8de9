"""The body of an HTTP message: its transfer and content encodings undone, and whether what is left can be a text.

Headers are not believed: many crawlers store the decoded body under the headers of the encoded one, servers send raw
deflate for deflate, and PDF files as text/html. What is declared is tried, and so is what the first bytes say.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

_STEP_BYTES = 1 << 14
_ZSTD_STEP_BYTES = 1 << 8  # may expand to 8 MB
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
_LINE_END = re.compile(rb"\r?\n")
_NONE = ("", "identity", "none", "binary", "utf-8")
_UNDECLARED = {
    "chunked": re.compile(rb"[0-9a-fA-F]{1,8}[ \t]*\r\n.*\n0+[ \t]*\r\n\s*\Z", re.DOTALL),
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
}
# What is no text even under an HTML header.
_MAGIC = {
    b"%PDF-": "PDF", b"%!PS": "PostScript", b"{\\rtf": "RTF", b"\xd0\xcf\x11\xe0": "Office document",
    b"PK\x03\x04": "ZIP", b"Rar!\x1a": "RAR", b"7z\xbc\xaf\x27\x1c": "7z", b"\x1f\x8b": "gzip", b"BZh": "bzip2",
    b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x89PNG": "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF",
    b"\xff\xd8\xff": "JPEG", b"RIFF": "RIFF", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"\0\0\1\0": "icon", b"OggS": "Ogg",
    b"ID3": "MP3", b"fLaC": "FLAC", b"\x1aE\xdf\xa3": "Matroska", b"FLV\1": "Flash", b"CWS": "Flash", b"FWS": "Flash",
    b"wOFF": "font", b"wOF2": "font", b"\0asm": "WebAssembly", b"\x7fELF": "program", b"MZ\x90\0": "program",
    b"SQLite format 3": "SQLite",
}  # fmt: skip
_MAGIC_BYTES = 1024  # which white space may precede
_SEEN_BYTES = 1 << 14
_CONTROL = bytes([*range(0x09), 0x0B, *range(0x0E, 0x1B), *range(0x1C, 0x20)])
_MAX_CONTROL_SHARE = 0.02  # of random bytes it is 0.11


class Body(NamedTuple):
    """A decoded body, or what is left of one that cannot be used."""

    content: bytes
    problem: str = ""
    """"undecodable_encoding" or "binary_body"."""
    detail: str = ""


class _NotEncodedError(ValueError):
    """The bytes are not what their header says."""


def decode_body(body: bytes, encodings: Sequence[str], max_bytes: int) -> Body:
    """Undo the encodings of a body, given in the order in which they were applied, as the headers name them.

    A content of more than `max_bytes` is given only so far that one sees that it is: it may expand without limit.
    """
    failed: dict[str, str] = {}
    for name in reversed([each for named in encodings for each in _names(named)]):
        body = _tried(name, body, max_bytes, failed)
    for name, magic in _UNDECLARED.items():  # what no header says
        if magic.match(body):
            body = _tried(name, body, max_bytes, failed)
    kind = binary_kind(body)
    if kind and failed:
        return Body(body, "undecodable_encoding", "; ".join(f"{name}: {why}" for name, why in failed.items()))
    return Body(body, "binary_body" if kind else "", kind)


def _tried(name: str, body: bytes, max_bytes: int, failed: dict[str, str]) -> bytes:
    """The body with an encoding undone, or as it is when that fails."""
    try:
        return _DECODERS[name](body, max_bytes)
    except KeyError:
        if name not in _NONE:
            failed[name] = "nobody knows it"
    except _NotEncodedError as error:
        failed[name] = str(error)
    return body


def binary_kind(data: bytes) -> str:
    """What data are that cannot be a text, in one or two words; "" when they can be one."""
    head = data[:_MAGIC_BYTES].lstrip()
    for magic, kind in _MAGIC.items():
        if head.startswith(magic) or data.startswith(magic):
            return kind
    if data[4:8] == b"ftyp":
        return "MP4"
    seen = data[:_SEEN_BYTES]
    if seen and not utf_16_kind(seen):
        control = len(seen) - len(seen.translate(None, _CONTROL))
        if control > _MAX_CONTROL_SHARE * len(seen):
            return "control bytes"
    return ""


def utf_16_kind(data: bytes) -> str:
    """ "utf-16-le" or "utf-16-be" when data look like markup in it, with a byte order mark or without; else ""."""
    if data.startswith(b"\xff\xfe"):
        return "utf-16-le"
    if data.startswith(b"\xfe\xff"):
        return "utf-16-be"
    seen = data[:_SEEN_BYTES]
    even, odd = seen[::2].count(0), seen[1::2].count(0)
    if max(even, odd) > 0.2 * len(seen) and min(even, odd) < 0.02 * len(seen):
        return "utf-16-le" if odd > even else "utf-16-be"
    return ""


def _names(header: str) -> Iterable[str]:
    return (name.strip().lower().removeprefix("x-") for name in header.split(","))


def _inflated(body: bytes, max_bytes: int, window_bits: int) -> tuple[bytes, bytes]:
    """(the content, what stands behind it)"""
    member = zlib.decompressobj(wbits=window_bits)
    try:
        content = member.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise _NotEncodedError(str(error)) from None
    if not member.eof and len(content) <= max_bytes:
        raise _NotEncodedError("its end is missing")
    return content, member.unused_data


def _gzip(body: bytes, max_bytes: int) -> bytes:
    content, rest = _inflated(body, max_bytes, 31)
    while rest.startswith(b"\x1f\x8b") and len(content) <= max_bytes:  # of several members
        more, rest = _inflated(rest, max_bytes - len(content), 31)
        content += more
    return content


def _deflate(body: bytes, max_bytes: int) -> bytes:
    """The zlib format, as the standard says, the bare data of many servers, or gzip."""
    for window_bits in (15, -15):
        try:
            return _inflated(body, max_bytes, window_bits)[0]
        except _NotEncodedError:
            continue
    return _gzip(body, max_bytes)


def _brotli(body: bytes, max_bytes: int) -> bytes:
    try:
        import brotli
    except ImportError:
        raise _NotEncodedError("reading it needs the package brotli") from None
    decoder = brotli.Decompressor()
    content = bytearray()
    try:
        content += decoder.process(body, output_buffer_limit=_STEP_BYTES)
        while len(content) <= max_bytes and not decoder.is_finished():
            if decoder.can_accept_more_data():
                raise _NotEncodedError("its end is missing")
            content += decoder.process(b"", output_buffer_limit=max(_STEP_BYTES, len(content)))
    except brotli.error as error:
        raise _NotEncodedError(str(error)) from None
    return bytes(content)


def _zstd(body: bytes, max_bytes: int) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise _NotEncodedError("reading it needs the package zstandard") from None
    decoder: Any = zstandard.ZstdDecompressor().decompressobj()
    content = bytearray()
    try:
        for start in range(0, len(body), _ZSTD_STEP_BYTES):
            content += decoder.decompress(body[start : start + _ZSTD_STEP_BYTES])
            if decoder.eof or len(content) > max_bytes:
                return bytes(content)
    except zstandard.ZstdError as error:
        raise _NotEncodedError(str(error)) from None
    raise _NotEncodedError("its end is missing")


def _dechunked(body: bytes, max_bytes: int) -> bytes:
    content = bytearray()
    position = 0
    while (head := _CHUNK.match(body, position)) is not None:
        size = int(head[1], 16)
        if size == 0:
            return bytes(content)
        content += body[head.end() : head.end() + size]
        position = head.end() + size
        line_end = _LINE_END.match(body, position)
        if line_end is None:
            break
        position = line_end.end()
    if not content or position < len(body):
        raise _NotEncodedError("it is not cut into chunks")
    return bytes(content)  # the connection was cut


_DECODERS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _gzip,
    "deflate": _deflate,
    "br": _brotli,
    "zstd": _zstd,
    "chunked": _dechunked,
}
