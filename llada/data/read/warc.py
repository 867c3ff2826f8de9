"""WARC: the HTML pages of a crawl (ISO 28500: records of a header, a blank line and Content-Length bytes), one at a time.

fastwarc reads a record and its HTTP message. Cutting the stream into records is done here, because its iterator ends
at the first damaged byte and gives a cut record as a whole one: here the damaged records alone are lost, what follows
is found again at the next compressed member (each record is one, by the standard) or at the next record's first line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from llada.data.outcomes import Rejects
from llada.data.read.compression import decompressor as new_decompressor
from llada.data.read.compression import is_damage, split_compression
from llada.data.read.extraction import decode_html, text_extractor
from llada.data.read.parts import Part, Reader, ReadOptions, Record
from llada.errors import UserError
from llada.files import open_bytes

_READ_BYTES = 1 << 16  # small: a member may expand a thousandfold
_MAX_HEADER_BYTES = 1 << 16
_MAX_HELD_BYTES = 1 << 22
_MAGIC = {"gzip": b"\x1f\x8b\x08", "zstd": b"\x28\xb5\x2f\xfd"}
_RECORD_START = b"WARC/1."
_LENGTH = re.compile(rb"^content-length:[ \t]*([0-9]{1,18})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_RESPONSE = re.compile(rb"^warc-type:[ \t]*response[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_HTML_START = re.compile(rb"<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)


class Page(NamedTuple):
    """The HTML of one response, decoded from its transfer and content encodings; `charset` as its HTTP header says."""

    record_id: str
    url: str | None
    html: bytes
    charset: str | None


class Skipped(NamedTuple):
    """A sound response that is no page: "not_http", "not_200" or "not_html"."""

    reason: str


class Lost(NamedTuple):
    """A record that cannot be used: "damaged_record", "truncated_file" or "too_large"."""

    reason: str
    detail: str


def read_warc(part: Part, options: ReadOptions, rejects: Rejects) -> Iterator[Record]:
    """The main text of each page, as {"id", "url", "text"}. Rejected: damaged or too large records, and pages that no
    text can be extracted from; sound responses that are no page, or have no text, are skipped."""
    extract = text_extractor(options.extractor)
    with open_bytes(part.file.url) as stream:
        compression = split_compression(part.file.url)[1]
        for line, page in read_pages(stream, compression, options.max_record_bytes):
            if isinstance(page, Lost):
                rejects.add(page.reason, part.label, line, page.detail)
                continue
            if isinstance(page, Skipped):
                rejects.skipped[page.reason] += 1
                continue
            html = decode_html(page.html, page.charset)
            try:
                text = extract(html)
            except Exception as error:  # one page that a parser fails on does not stop a crawl of billions
                problem = f"{page.url}: {type(error).__name__}: {error}"
                rejects.add("extraction_failed", part.label, line, problem)
                continue
            if text:
                yield Record({"id": page.record_id or None, "url": page.url, "text": text}, line)
            else:
                rejects.skipped["no_main_content"] += 1


def read_pages(
    stream: BinaryIO, compression: str | None, max_bytes: int
) -> Iterator[tuple[int, Page | Skipped | Lost]]:
    """(number of the record from 1, what became of it) for each response and each loss; other records are passed over.

    Args:
        stream: read forward only, in small pieces.
        compression: None, "gzip" or "zstd" (without a dictionary).
        max_bytes: the largest record, and the largest page after HTTP decoding.
    """
    blocks = _raw(stream) if compression is None else _decompressed(stream, compression)
    for number, record in enumerate(_records(blocks, max_bytes), 1):
        outcome = record if isinstance(record, Lost) else _page(record, max_bytes)
        if outcome is not None:
            yield number, outcome


def _raw(stream: BinaryIO) -> Iterator[bytes]:
    while data := stream.read(_READ_BYTES):
        yield data


def _decompressed(stream: BinaryIO, compression: str) -> Iterator[bytes | Lost]:
    """The decompressed bytes, with a `Lost` where they break off."""
    magic = _MAGIC[compression]
    compressed = bytearray()  # from the start of the member being read
    fed = 0  # how many of them the decompressor has
    decompressor: Any = None
    searching = False  # for the start of a member, after damage
    while data := stream.read(_READ_BYTES):
        compressed += data
        while fed < len(compressed):
            if decompressor is None and searching:
                start = compressed.find(magic)
                del compressed[: start if start >= 0 else max(0, len(compressed) - len(magic) + 1)]
                if start < 0:
                    break
            try:
                decompressor = decompressor or new_decompressor(compression)
                yield decompressor.decompress(bytes(compressed[fed:]))
            except Exception as error:
                if not is_damage(error):
                    raise
                yield Lost("damaged_record", f"{compression} error: {error}")
                # Garbage may decode for a while, past the start of the next member: search from this one's start.
                del compressed[:1]
                decompressor, fed, searching = None, 0, True
                continue
            fed = len(compressed)
            if decompressor.eof:
                del compressed[: fed - len(decompressor.unused_data)]
                decompressor, fed, searching = None, 0, False
            elif fed > _MAX_HELD_BYTES:  # a file compressed as a whole: what follows damage is lost with it
                del compressed[: fed - 1]
                fed = 1
    if decompressor is not None:
        yield Lost("truncated_file", f"the {compression} stream ends before its end mark")


def _records(blocks: Iterator[bytes | Lost], max_bytes: int) -> Iterator[bytes | Lost]:
    """Whole records (header and content), and what was lost between them."""
    unread = bytearray()  # decompressed bytes from the start of the next record
    to_skip = 0  # bytes still to come of a record that is not wanted
    lost = False  # the next record's start is being searched
    for block in blocks:
        if isinstance(block, Lost):
            if not lost or block.reason == "truncated_file":
                yield block
            unread.clear()
            to_skip, lost = 0, True
            continue
        unread += block
        while unread:
            if to_skip:
                passed = min(to_skip, len(unread))
                del unread[:passed]
                to_skip -= passed
                continue
            if lost:
                start = unread.find(_RECORD_START)
                del unread[: start if start >= 0 else max(0, len(unread) - len(_RECORD_START) + 1)]
                if start < 0:
                    break
                lost = False
            while unread[:1] in (b"\r", b"\n"):  # a record ends with two line breaks
                del unread[:1]
            header_end = unread.find(b"\r\n\r\n", 0, _MAX_HEADER_BYTES)
            if header_end < 0 and len(unread) < _MAX_HEADER_BYTES and _RECORD_START.startswith(unread[:7]):
                break
            header = bytes(unread[: max(0, header_end)])
            length = _LENGTH.search(header)
            if not header.startswith(_RECORD_START) or length is None:
                yield Lost("damaged_record", "no WARC header: " + unread[:80].decode("utf-8", "replace"))
                del unread[:1]
                lost = True
                continue
            size = header_end + 4 + int(length[1])
            if int(length[1]) > max_bytes:
                if _RESPONSE.search(header):
                    yield Lost("too_large", f"{int(length[1])} bytes: {header.decode('utf-8', 'replace')}")
                to_skip = size
                continue
            if len(unread) < size:
                break
            yield bytes(unread[:size])
            del unread[:size]
    if (unread and not lost) or to_skip:
        yield Lost("truncated_file", "the file ends inside a record")


def _page(data: bytes, max_bytes: int) -> Page | Skipped | Lost | None:
    """What one record holds; None when it is no response."""
    try:
        from fastwarc.warc import WarcRecord, WarcRecordType
    except ImportError:
        raise UserError("reading WARC files needs the package fastwarc: pip install fastwarc") from None
    record = WarcRecord.from_bytes(data)
    if record.record_type != WarcRecordType.response:
        return None
    content_type = record.headers.get("Content-Type") or ""
    if not content_type.lower().startswith("application/http"):
        return Skipped("not_http")  # a DNS or FTP answer
    try:
        record.parse_http(auto_decode="all", strict_mode=False)
        html = _read(record, max_bytes)
    except OSError:  # many crawlers store the decoded body under the headers of the encoded one
        record = WarcRecord.from_bytes(data)
        record.parse_http(auto_decode="none", strict_mode=False)
        html = _read(record, max_bytes)
    if record.http_headers is None or record.http_headers.status_code is None:
        return Lost("damaged_record", "no HTTP header")
    if record.http_headers.status_code != 200:
        return Skipped("not_200")
    kind = record.headers.get("WARC-Identified-Payload-Type") or record.http_content_type
    if kind.lower() not in _HTML_TYPES if kind else not _HTML_START.search(html[:1024]):
        return Skipped("not_html")
    if len(html) > max_bytes:
        return Lost("too_large", f"more than {max_bytes} bytes after HTTP decoding")
    if html.startswith(_MAGIC["gzip"]):
        return Lost("damaged_record", "the content encoding cannot be decoded")
    url = record.headers.get("WARC-Target-URI")
    return Page(record.record_id or "", url.strip("<> ") if url else None, html, record.http_charset)


def _read(record: Any, max_bytes: int) -> bytes:
    """The body, at most `max_bytes` + 1 of it: a compressed one may expand without limit."""
    body = bytearray()
    while len(body) <= max_bytes and (piece := record.reader.read(min(1 << 20, max_bytes + 1 - len(body)))):
        body += piece
    return bytes(body)


WARC = Reader((".warc",), read_warc, is_compressible=True, text_field="text")
