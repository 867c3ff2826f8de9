"""WARC: the pages of a crawl (ISO 28500: records of a header, a blank line and Content-Length bytes), one at a time, and
the texts that others have made of them (WET). The drafts before 1.0 are read too, and headers whose lines end in a line
feed alone, as those of ClueWeb09.

fastwarc reads a record and its HTTP message. Cutting the stream into records is done here, because its iterator ends
at the first damaged byte and gives a cut record as a whole one: here the damaged records alone are lost, what follows
is found again at the next compressed member (each record is one, by the standard) or at the next record's first line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

from llada.data.outcomes import Rejects
from llada.data.read.compression import SOUND, Damage, Piece, decompressed, split_compression
from llada.data.read.extraction import decode_html, text_extractor
from llada.data.read.http_body import binary_kind, decode_body
from llada.data.read.parts import Part, Reader, ReadOptions, Record
from llada.errors import UserError
from llada.files import open_bytes

_READ_BYTES = 1 << 16  # small: a member may expand a thousandfold
_MAX_HEADER_BYTES = 1 << 16
_RECORD_START = b"WARC/"
_FIRST_LINE = re.compile(rb"WARC/[0-9]{1,3}\.[0-9]{1,3}[ \t]*\r?\n")
_FIRST_LINE_BYTES = 32
_HEADER_END = re.compile(rb"\r?\n\r?\n")
_LENGTH = re.compile(rb"^content-length:[ \t]*([0-9]{1,18})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_TYPE = re.compile(rb"^warc-type:[ \t]*([a-z0-9_.-]{1,40})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_READ_TYPES = ("response", "resource", "conversion")
# Of what a crawler has fetched. Others name its own notes: metadata://gnu.org/software/wget/warc/wget.log
_FETCHED = re.compile(r"(?:https?|ftps?|file|gopher|gemini):|[^:]*$", re.IGNORECASE)
_OF_FILE = ("damaged_record", "truncated_file", "trailing_garbage", "empty_file")
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_HTML_START = re.compile(rb"<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)


class Page(NamedTuple):
    """The HTML of one response, decoded from its transfer and content encodings; `charset` as its HTTP header says."""

    record_id: str
    url: str | None
    html: bytes
    charset: str | None
    date: str | None = None


class PlainText(NamedTuple):
    """A text that was stored as such."""

    record_id: str
    url: str | None
    text: bytes
    charset: str | None
    date: str | None = None


class Skipped(NamedTuple):
    """A sound record that is no page: "not_http", "not_200", "not_html", "dns", or the type of a record that never
    is one, such as "request"."""

    reason: str


class Lost(NamedTuple):
    """A record that cannot be used: "damaged_record", "too_large", or what is wrong with a `Body`; or where the file
    itself is broken: "damaged_record" too, "truncated_file", "trailing_garbage" or "empty_file"."""

    reason: str
    detail: str
    doubtful: int = 0
    """Records given before that may be altered, at most so many."""


_TRUNCATED = Lost("truncated_file", "the file ends inside a record")


def read_warc(part: Part, options: ReadOptions, rejects: Rejects) -> Iterator[Record]:
    """The main text of each page, as {"id", "url", "date", "text"}. Rejected: damaged or too large records, and pages
    that no text can be extracted from; sound records that are no page, or have no text, are skipped."""
    extract = text_extractor(options.extractor)
    with open_bytes(part.file.url) as stream:
        compression = split_compression(part.file.url)[1]
        for line, page in read_pages(stream, compression, options.max_record_bytes):
            if isinstance(page, Lost):
                if page.reason in _OF_FILE:
                    rejects.add_fault(page.reason, part.label, page.detail, line=line, doubtful=page.doubtful)
                else:
                    rejects.add(page.reason, part.label, line, page.detail)
                continue
            if isinstance(page, Skipped):
                rejects.skipped[page.reason] += 1
                continue
            try:
                if isinstance(page, PlainText):
                    text = decode_html(page.text, page.charset).strip()
                else:
                    text = extract(decode_html(page.html, page.charset))
            except Exception as error:  # one page that a parser fails on does not stop a crawl of billions
                problem = f"{page.url}: {type(error).__name__}: {error}"
                rejects.add("extraction_failed", part.label, line, problem)
                continue
            if text:
                fields = {"id": page.record_id or None, "url": page.url, "date": page.date, "text": text}
                yield Record(fields, line)
            else:
                rejects.skipped["no_main_content"] += 1


def read_pages(
    stream: BinaryIO, compression: str | None, max_bytes: int
) -> Iterator[tuple[int, Page | PlainText | Skipped | Lost]]:
    """(number of the record from 1, what became of it) for each record and each loss.

    Args:
        stream: read forward only, in small pieces.
        compression: None, or as `decompressed` takes it.
        max_bytes: the largest record, and the largest page after HTTP decoding.
    """
    blocks = _raw(stream) if compression is None else decompressed(stream, compression)
    for number, record in enumerate(_records(blocks, max_bytes), 1):
        yield number, _page(record, max_bytes) if isinstance(record, bytes) else record


def _raw(stream: BinaryIO) -> Iterator[bytes]:
    while data := stream.read(_READ_BYTES):
        yield data


def _records(blocks: Iterator[Piece], max_bytes: int) -> Iterator[bytes | Skipped | Lost]:
    """Whole records (header and content) of the types that are read, and what was lost between them."""
    unread = bytearray()  # decompressed bytes from the start of the next record
    to_skip = 0  # bytes still to come of a record that is not wanted
    lost = False  # the next record's start is being searched
    unproven = 0  # records given since all was known to be sound
    for block in chain(blocks, [None]):  # and at the end what is left
        if block is SOUND:
            unproven = 0
            continue
        damage = block if isinstance(block, Damage) else None
        unread += block.unproven if isinstance(block, Damage) else block or b""
        while unread:
            if to_skip:
                passed = min(to_skip, len(unread))
                del unread[:passed]
                to_skip -= passed
                continue
            if lost:
                start = _FIRST_LINE.search(unread)
                del unread[: start.start() if start else max(0, len(unread) - _FIRST_LINE_BYTES)]
                if start is None:
                    break
                lost = False
            while unread[:1] in (b"\r", b"\n"):  # a record ends with two line breaks
                del unread[:1]
            header_end = _HEADER_END.search(unread, 0, _MAX_HEADER_BYTES)
            is_cut = (
                header_end is None
                and len(unread) < _MAX_HEADER_BYTES
                and _RECORD_START.startswith(unread[: len(_RECORD_START)])
            )
            if is_cut and block is not None:
                break
            header = bytes(unread[: header_end.start() if header_end else 0])
            length = _LENGTH.search(header)
            if not is_cut and (header_end is None or length is None or not _FIRST_LINE.match(header)):
                yield Lost("damaged_record", "no WARC header: " + unread[:80].decode("utf-8", "replace"))
                del unread[:1]
                lost = True
                continue
            if header_end is None or length is None:
                yield _TRUNCATED
                unread.clear()
                break
            size = header_end.end() + int(length[1])
            kind = _record_type(header)
            if kind not in _READ_TYPES:
                yield Skipped(kind)
                to_skip = size
                continue
            if int(length[1]) > max_bytes:
                yield Lost("too_large", f"{int(length[1])} bytes: {header.decode('utf-8', 'replace')}")
                to_skip = size
                continue
            if len(unread) < size and block is not None:
                break
            if len(unread) < size:  # or its length is wrong: others may stand in what would be its content
                yield _TRUNCATED
                del unread[:1]
                lost = True
                continue
            behind = bytes(unread[size : size + len(b"\r\n\r\n") + len(_RECORD_START)]).lstrip(b"\r\n")
            if not _RECORD_START.startswith(behind[: len(_RECORD_START)]) and (
                swallowed := _FIRST_LINE.search(unread, header_end.end(), size)
            ):
                yield Lost("damaged_record", f"its length is wrong: {header.decode('utf-8', 'replace')}")
                del unread[: swallowed.start()]
                continue
            if damage and not unread[size:].lstrip(b"\r\n").startswith(_RECORD_START):
                break  # the last of a damaged member, or its only one: who knows where the damage is
            yield bytes(unread[:size])
            unproven += 1
            del unread[:size]
        if damage:
            if not lost or damage.reason != "damaged_file":
                reason = "damaged_record" if damage.reason == "damaged_file" else damage.reason
                yield Lost(reason, damage.detail, unproven if reason == "damaged_record" else 0)
            unread.clear()
            to_skip, unproven, lost = 0, 0, True
    if to_skip:
        yield _TRUNCATED


def _record_type(header: bytes) -> str:
    found = _TYPE.search(header)
    return found[1].decode().lower() if found else "unknown_type"


def _normal(record: bytes) -> bytes:
    """A record with the version and the line ends that fastwarc asks for in its headers."""
    record = _with_crlf(_FIRST_LINE.sub(b"WARC/1.0\r\n", record, count=1))
    header, blank, content = record.partition(b"\r\n\r\n")
    message = _with_crlf(content) if content.startswith(b"HTTP/") else content
    if len(message) != len(content):
        header = _LENGTH.sub(b"Content-Length: %d\r" % len(message), header).removesuffix(b"\r")
    return header + blank + message


def _with_crlf(message: bytes) -> bytes:
    """A message whose header's lines, if they end in line feeds alone, end in CRLF."""
    end = _HEADER_END.search(message, 0, _MAX_HEADER_BYTES)
    if end is None or end[0] == b"\r\n\r\n":
        return message
    header = re.sub(rb"\r?\n", b"\r\n", message[: end.start()])
    return header + b"\r\n\r\n" + message[end.end() :]


def _page(data: bytes, max_bytes: int) -> Page | PlainText | Skipped | Lost:
    """What one record of the types that are read holds."""
    try:
        from fastwarc.warc import WarcRecord
    except ImportError:
        raise UserError("reading WARC files needs the package fastwarc: pip install fastwarc") from None
    data = _normal(data)
    record = WarcRecord.from_bytes(data)
    kind = _record_type(data)
    content_type = (record.headers.get("Content-Type") or "").lower()
    url = (record.headers.get("WARC-Target-URI") or "").strip("<> ") or None
    date = record.headers.get("WARC-Date")
    if not content_type.startswith("application/http"):
        if kind == "response":
            return Skipped("dns" if content_type.startswith("text/dns") else "not_http")
        return _stored(record, kind, url, date)
    record.parse_http(auto_decode="none", strict_mode=False)
    if record.http_headers is None or record.http_headers.status_code is None:
        return Lost("damaged_record", "no HTTP header")
    if record.http_headers.status_code != 200:
        return Skipped("not_200")
    encodings = [
        value
        for name in ("Content-Encoding", "Transfer-Encoding")
        for value in record.http_headers.get_multiple(name)
    ]
    html, problem, detail = decode_body(record.reader.read(), encodings, max_bytes)
    media_type = record.headers.get("WARC-Identified-Payload-Type") or record.http_content_type
    if media_type.lower() not in _HTML_TYPES if media_type else not _HTML_START.search(html[:1024]):
        return Skipped("not_html")
    if len(html) > max_bytes:
        return Lost("too_large", f"more than {max_bytes} bytes after HTTP decoding")
    if problem:
        return Lost(problem, f"{url}: {detail}")
    return Page(record.record_id or "", url, html, record.http_charset, date)


def _stored(record: Any, kind: str, url: str | None, date: str | None) -> Page | PlainText | Skipped | Lost:
    """What a resource or conversion holds: the thing itself, without the HTTP that brought it."""
    if kind == "resource" and not _FETCHED.match(url or ""):
        return Skipped(kind)
    content = record.reader.read()
    untyped = "text/html" if _HTML_START.search(content[:1024]) else "text/plain"
    content_type = record.headers.get("Content-Type") or untyped
    media_type, *parameters = (piece.strip() for piece in content_type.split(";"))
    named = record.headers.get("WARC-Identified-Payload-Type") or media_type
    charset = next((p.partition("=")[2] for p in parameters if p.lower().startswith("charset=")), None)
    if named.lower() in (*_HTML_TYPES, "text/plain") and (binary := binary_kind(content)):
        return Lost("binary_body", f"{url}: {binary}")
    if named.lower() in _HTML_TYPES:
        return Page(record.record_id or "", url, content, charset, date)
    if named.lower() == "text/plain":
        return PlainText(record.record_id or "", url, content, charset, date)
    return Skipped("not_html")


WARC = Reader((".warc", ".wet"), read_warc, is_compressible=True, text_field="text")
