"""WARC: the HTML pages of a crawl (ISO 28500: records of a header, a blank line and Content-Length bytes), one at a time.

fastwarc reads a record and its HTTP message. Cutting the stream into records is done here, because its iterator ends
at the first damaged byte and gives a cut record as a whole one: here the damaged records alone are lost, what follows
is found again at the next compressed member (each record is one, by the standard) or at the next record's first line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from llada.data.outcomes import Rejects
from llada.data.read.compression import SOUND, Damage, Piece, decompressed, split_compression
from llada.data.read.extraction import decode_html, text_extractor
from llada.data.read.http_body import decode_body
from llada.data.read.parts import Part, Reader, ReadOptions, Record
from llada.errors import UserError
from llada.files import filesystem

_READ_BYTES = 1 << 16  # small: a member may expand a thousandfold
_MAX_HEADER_BYTES = 1 << 16
_RECORD_START = b"WARC/1."
_LENGTH = re.compile(rb"^content-length:[ \t]*([0-9]{1,18})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_RESPONSE = re.compile(rb"^warc-type:[ \t]*response[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_OF_FILE = ("damaged_record", "truncated_file", "trailing_garbage", "empty_file")
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
    """A record that cannot be used: "damaged_record", "too_large", or what is wrong with a `Body`; or where the file
    itself is broken: "damaged_record" too, "truncated_file", "trailing_garbage" or "empty_file"."""

    reason: str
    detail: str
    doubtful: int = 0
    """Records given before that may be altered, at most so many."""


def read_warc(part: Part, options: ReadOptions, rejects: Rejects) -> Iterator[Record]:
    """The main text of each page, as {"id", "url", "text"}. Rejected: damaged or too large records, and pages that no
    text can be extracted from; sound responses that are no page, or have no text, are skipped."""
    extract = text_extractor(options.extractor)
    fs, path = filesystem(part.file.url)
    with fs.open(path, "rb") as stream:
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
        compression: None, or as `decompressed` takes it.
        max_bytes: the largest record, and the largest page after HTTP decoding.
    """
    blocks = _raw(stream) if compression is None else decompressed(stream, compression)
    for number, record in enumerate(_records(blocks, max_bytes), 1):
        outcome = record if isinstance(record, Lost) else _page(record, max_bytes)
        if outcome is not None:
            yield number, outcome


def _raw(stream: BinaryIO) -> Iterator[bytes]:
    while data := stream.read(_READ_BYTES):
        yield data


def _records(blocks: Iterator[Piece], max_bytes: int) -> Iterator[bytes | Lost]:
    """Whole records (header and content), and what was lost between them."""
    unread = bytearray()  # decompressed bytes from the start of the next record
    to_skip = 0  # bytes still to come of a record that is not wanted
    lost = False  # the next record's start is being searched
    unproven = 0  # records given since all was known to be sound
    for block in blocks:
        if block is SOUND:
            unproven = 0
            continue
        damage = block if isinstance(block, Damage) else None
        unread += block.unproven if isinstance(block, Damage) else block
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
    kind = record.headers.get("WARC-Identified-Payload-Type") or record.http_content_type
    if kind.lower() not in _HTML_TYPES if kind else not _HTML_START.search(html[:1024]):
        return Skipped("not_html")
    if len(html) > max_bytes:
        return Lost("too_large", f"more than {max_bytes} bytes after HTTP decoding")
    url = record.headers.get("WARC-Target-URI")
    if problem:
        return Lost(problem, f"{url}: {detail}")
    return Page(record.record_id or "", url.strip("<> ") if url else None, html, record.http_charset)


WARC = Reader((".warc",), read_warc, is_compressible=True, text_field="text")
