"""llada/data/read/http_body.py: encodings undone, whatever the headers say, and what is no text."""

import gzip
import random
import sys
import zlib

import brotli
import pytest
import zstandard

from llada.data.read.http_body import binary_kind, decode_body, utf_16_kind

HTML = b"<!doctype html><html><body>caf\xc3\xa9 " + b"words " * 200 + b"</body></html>"
LIMIT = 1 << 20


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def chunked(data: bytes, size: int = 100) -> bytes:
    pieces = (data[i : i + size] for i in range(0, len(data), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("body", "encodings"),
    [
        (HTML, []),
        (HTML, ["identity"]),
        (gzip.compress(HTML, mtime=0), ["gzip"]),
        (gzip.compress(HTML, mtime=0), ["GZip "]),
        (gzip.compress(HTML, mtime=0), ["x-gzip"]),
        (gzip.compress(HTML[:50], mtime=0) + gzip.compress(HTML[50:], mtime=0), ["gzip"]),
        (gzip.compress(HTML, mtime=0) + bytes(20), ["gzip"]),
        (zlib.compress(HTML), ["deflate"]),
        (raw_deflate(HTML), ["deflate"]),
        (gzip.compress(HTML, mtime=0), ["deflate"]),
        (brotli.compress(HTML), ["br"]),
        (zstandard.compress(HTML), ["zstd"]),
        (chunked(HTML), ["chunked"]),
        (chunked(HTML).replace(b"64\r\n", b"64;ext=1\r\n"), ["chunked"]),
        # Several: in one header, in two, and content before transfer.
        (brotli.compress(gzip.compress(HTML, mtime=0)), ["gzip, br"]),
        (brotli.compress(gzip.compress(HTML, mtime=0)), ["gzip", "br"]),
        (chunked(gzip.compress(HTML, mtime=0)), ["gzip", "chunked"]),
        (gzip.compress(gzip.compress(HTML, mtime=0), mtime=0), ["gzip"]),
        # Decoded already, under the headers of the encoded one.
        (HTML, ["gzip"]),
        (HTML, ["deflate"]),
        (HTML, ["br"]),
        (HTML, ["zstd", "chunked"]),
        (HTML, ["none-known"]),
        (gzip.compress(HTML, mtime=0), ["gzip", "chunked"]),
        # Encoded, and no header says so.
        (gzip.compress(HTML, mtime=0), []),
        (zstandard.compress(HTML), []),
        (chunked(HTML), []),
        (chunked(gzip.compress(HTML, mtime=0)), ["gzip"]),
    ],
)
def test_encodings_are_undone_whatever_the_headers_say(body, encodings):
    assert decode_body(body, encodings, LIMIT) == (HTML, "", "")


def test_a_connection_that_was_cut_between_chunks():
    content = decode_body(chunked(HTML)[:-60], ["chunked"], LIMIT).content
    assert HTML.startswith(content)
    assert len(content) > len(HTML) - 60
    for plain in (b"abc\r\n<html>" + HTML, b"0\r\n<html>"):
        assert decode_body(plain, [], LIMIT).content == plain


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (gzip.compress(random.Random(0).randbytes(5000))[:-100], "gzip"),
        (raw_deflate(random.Random(0).randbytes(5000))[:-1000], "deflate"),
        (brotli.compress(random.Random(0).randbytes(5000))[:-100], "br"),
        (zstandard.compress(random.Random(0).randbytes(5000))[:-100], "zstd"),
        (random.Random(0).randbytes(5000), "compress"),
    ],
)
def test_what_cannot_be_decoded_is_no_text(body, encoding):
    content, problem, detail = decode_body(body, [encoding], LIMIT)
    assert content == body
    assert problem == "undecodable_encoding"
    assert detail.startswith(f"{encoding}: ")


def test_brotli_without_its_package(monkeypatch):
    body = brotli.compress(random.Random(0).randbytes(5000))
    monkeypatch.setitem(sys.modules, "brotli", None)
    assert decode_body(body, ["br"], LIMIT)[1:] == (
        "undecodable_encoding",
        "br: reading it needs the package brotli",
    )


@pytest.mark.parametrize(
    "pack", [gzip.compress, zlib.compress, raw_deflate, brotli.compress, zstandard.compress]
)
def test_a_content_without_end_is_decoded_no_further_than_is_needed(pack):
    name = {gzip.compress: "gzip", brotli.compress: "br", zstandard.compress: "zstd"}.get(pack, "deflate")
    content = decode_body(pack(bytes(50 << 20)), [name], 1000).content
    assert 1000 < len(content) < 10 << 20


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (HTML, ""),
        (b"", ""),
        (b"\xef\xbb\xbf" + HTML, ""),
        ("Größe 中文".encode("gb18030"), ""),
        ("Привет".encode("koi8-r") * 50, ""),
        ("日本語".encode("iso2022_jp") * 50, ""),
        (b"one\0NUL in " + HTML, ""),
        (HTML.decode().encode("utf-16"), ""),
        (HTML.decode().encode("utf-16-be"), ""),
        (b"\n %PDF-1.4", "PDF"),
        (b"PK\x03\x04\x14", "ZIP"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "JPEG"),
        (b"\0\0\0\x20ftypisom", "MP4"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Office document"),
        (random.Random(0).randbytes(2000), "control bytes"),
        (bytes(2000), "control bytes"),
    ],
)
def test_what_is_no_text(data, kind):
    assert binary_kind(data) == kind


def test_utf_16_shows():
    assert utf_16_kind(HTML) == utf_16_kind(b"") == utf_16_kind(bytes(100)) == ""
    for encoding in ("utf-16-le", "utf-16-be"):
        assert utf_16_kind(HTML.decode().encode(encoding)) == encoding
        assert utf_16_kind("\ufeffä".encode(encoding)) == encoding
