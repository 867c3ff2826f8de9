import gzip
import io
import random
import re
import struct
import tracemalloc
import zlib
from collections import Counter

import brotli
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from llada.data.outcomes import Rejects
from llada.data.read.documents import read_documents
from llada.data.read.formats import read_records
from llada.data.read.listing import list_inputs
from llada.data.read.parts import Part, ReadOptions
from llada.data.read.warc import Lost, Page, PlainText, Skipped, read_pages
from llada.files import write_bytes

LIMIT = 1 << 20
HTML = b"<html><body>caf\xc3\xa9</body></html>"


def record(
    number: int,
    body: bytes = HTML,
    *,
    status: str = "200 OK",
    headers: tuple[str, ...] = ("Content-Type: text/html; charset=UTF-8",),
    kind: str = "response",
    content_type: str = "application/http; msgtype=response",
    extra: tuple[str, ...] = (),
) -> bytes:
    """One WARC record, as ISO 28500 writes it."""
    http = "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode() + body
    block = http if content_type.startswith("application/http") else body
    fields = [
        "WARC/1.0",
        f"WARC-Type: {kind}",
        f"WARC-Record-ID: <urn:uuid:{number}>",
        f"WARC-Target-URI: http://example.com/{number}",
        f"Content-Type: {content_type}",
        *extra,
        f"Content-Length: {len(block)}",
        "",
        "",
    ]
    return "\r\n".join(fields).encode() + block + b"\r\n\r\n"


def pages(data: bytes, compression: str | None = None, limit: int = LIMIT) -> list:
    return [found for _, found in read_pages(io.BytesIO(data), compression, limit)]


def ids(found: list) -> list[int]:
    return [int(page.record_id.split(":")[2].strip(">")) for page in found if isinstance(page, Page)]


def losses(found: list) -> list[str]:
    return [item.reason for item in found if isinstance(item, Lost)]


def varied(count: int) -> list[bytes]:
    rng = random.Random(0)
    return [record(i, b"<html>" + rng.randbytes(rng.randrange(20_000)).hex().encode()) for i in range(count)]


ONE_BY_ONE = {
    None: b"".join,
    "gzip": lambda records: b"".join(gzip.compress(r) for r in records),
    "zstd": lambda records: b"".join(zstandard.compress(r) for r in records),
}


@pytest.mark.parametrize("extra", [-7, 100, 3000, 10**6])
def test_a_length_that_is_wrong_costs_its_own_record(extra):
    """Too short, it leaves a part of its content before the next record; too long, it takes others in."""
    records = [record(number) for number in range(5)]
    length = re.search(rb"Content-Length: ([0-9]+)", records[1])
    records[1] = records[1].replace(length[0], b"Content-Length: %d" % (int(length[1]) + extra), 1)
    found = pages(b"".join(records), limit=1 << 24)
    assert [number for number in ids(found) if number != 1] == [0, 2, 3, 4]
    assert any(isinstance(page, Lost) for page in found)


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
def test_pages_come_as_they_were_sent(compression):
    records = [record(0, kind="warcinfo", content_type="application/warc-fields"), record(1, kind="request")]
    records += [
        record(2),
        record(3, HTML + b"\r\n\r\nWARC/1.0\r\n", extra=("WARC-Date: 2024-01-01T00:00:00Z",)),
    ]
    data = ONE_BY_ONE[compression](records)
    numbered = list(read_pages(io.BytesIO(data), compression, LIMIT))
    html = HTML + b"\r\n\r\nWARC/1.0\r\n"
    assert numbered == [
        (1, Skipped("warcinfo")),
        (2, Skipped("request")),
        (3, Page("<urn:uuid:2>", "http://example.com/2", HTML, "utf-8")),
        (4, Page("<urn:uuid:3>", "http://example.com/3", html, "utf-8", "2024-01-01T00:00:00Z")),
    ]


def test_a_file_compressed_as_a_whole():
    records = varied(30)
    for compression, data in (
        ("gzip", gzip.compress(b"".join(records))),
        ("zstd", zstandard.compress(b"".join(records))),
    ):
        assert ids(pages(data, compression)) == list(range(30))


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("Content-Encoding: gzip", gzip.compress(HTML, mtime=0)),
        ("Content-Encoding: deflate", zlib.compress(HTML)),
        ("Content-Encoding: br", brotli.compress(HTML)),
        ("Content-Encoding: zstd", zstandard.compress(HTML)),
        (
            "Transfer-Encoding: chunked",
            b"5\r\n" + HTML[:5] + b"\r\n%x\r\n" % (len(HTML) - 5) + HTML[5:] + b"\r\n0\r\n\r\n",
        ),
        # As many crawlers store it: decoded, under the headers of the encoded one.
        ("Content-Encoding: gzip", HTML),
        ("Transfer-Encoding: chunked", HTML),
        ("Content-Encoding: none-known", HTML),
    ],
)
def test_http_encodings_are_undone(encoding, body):
    (page,) = pages(record(1, body, headers=("Content-Type: text/html", encoding)))
    assert page.html == HTML
    assert page.charset is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"status": "404 Not Found"}, Skipped("not_200")),
        ({"status": "301 Moved", "headers": ("Location: /",)}, Skipped("not_200")),
        ({"headers": ("Content-Type: application/pdf",)}, Skipped("not_html")),
        ({"headers": ("Content-Type: image/png",), "body": b"\x89PNG"}, Skipped("not_html")),
        ({"headers": (), "body": b"plain words"}, Skipped("not_html")),
        ({"extra": ("WARC-Identified-Payload-Type: application/json",)}, Skipped("not_html")),
        ({"content_type": "text/dns"}, Skipped("dns")),
        ({"content_type": "text/html"}, Skipped("not_http")),
    ],
)
def test_what_is_no_page(options, expected):
    found = pages(record(1, **options) + record(2))
    assert ids(found) == [2]
    assert found[0] == expected


def test_a_page_that_is_none_is_rejected_with_the_reason(tmp_path, read):
    headers = ("Content-Type: text/html", "content-encoding: br")
    records = [
        record(1, b"%PDF-1.7\n1 0 obj <</Type /Catalog>> stream endstream"),
        record(2, b"\x89PNG\r\n\x1a\n" + bytes(100)),
        record(3, random.Random(0).randbytes(3000)),
        record(4, brotli.compress(random.Random(1).randbytes(3000).hex().encode())[:-500], headers=headers),
        record(
            5, random.Random(2).randbytes(3000), headers=("Content-Type: text/html", "Content-Encoding: lzw9")
        ),
        record(6, HTML.replace(b"caf", b"<p>a" + "\ufffd".encode() * 9 + b"</p>")),
        record(7, HTML),
    ]
    (tmp_path / "a.warc").write_bytes(b"".join(records))
    texts, rejects = read(tmp_path / "a.warc")
    assert texts == ["café"]
    assert dict(rejects.counts) == {"binary_body": 3, "undecodable_encoding": 2, "undecodable_text": 1}
    assert not rejects.faults
    told = [example["text"] for example in rejects.examples]
    assert told[:3] == [
        f"http://example.com/{i}: {kind}" for i, kind in ((1, "PDF"), (2, "PNG"), (3, "control bytes"))
    ]
    assert told[3].startswith("http://example.com/4: br: ")
    assert told[4] == "http://example.com/5: lzw9: nobody knows it"


@pytest.mark.parametrize(
    "options",
    [
        {"headers": ("Content-Type: application/xhtml+xml",)},
        {"headers": ("content-type: Text/HTML",)},
        {"headers": ()},
        {"headers": ("Content-Type: text/plain",), "extra": ("WARC-Identified-Payload-Type: text/html",)},
    ],
)
def test_what_is_a_page(options):
    assert ids(pages(record(1, **options))) == [1]


def test_a_response_without_http_is_damaged():
    broken = record(1).replace(b"HTTP/1.1 200 OK", b"garbage\x00\x01\x02 text")
    assert losses(pages(broken + record(2))) == ["damaged_record"]
    assert ids(pages(broken + record(2))) == [2]


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
def test_large_records_are_rejected_and_passed_over(compression):
    records = [
        record(1),
        record(2, HTML * 1000),
        record(3),
        record(4, HTML * 1000, kind="resource"),
        record(5),
    ]
    found = pages(ONE_BY_ONE[compression](records), compression, limit=10_000)
    assert ids(found) == [1, 3, 5]
    assert losses(found) == ["too_large", "too_large"]
    found = pages(record(1, HTML * 1000, kind="request") + record(2), limit=10_000)
    assert (found[0], ids(found)) == (Skipped("request"), [2]), "what is not read may be of any size"


def test_a_page_that_grows_too_large_when_decoded():
    bomb = record(
        1,
        gzip.compress(b"<html>" + bytes(50 << 20)),
        headers=("Content-Type: text/html", "Content-Encoding: gzip"),
    )
    found = pages(bomb + record(2), limit=1 << 20)
    assert ids(found) == [2]
    assert losses(found) == ["too_large"]


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
@pytest.mark.parametrize("seed", range(8))
def test_damage_in_the_middle_loses_only_the_damaged_records(compression, seed):
    rng = random.Random(seed)
    members = [ONE_BY_ONE[compression]([r]) for r in varied(30)]
    data = bytearray(b"".join(members))
    at = rng.randrange(len(data) - 20)
    data[at : at + 20] = rng.randbytes(20)
    starts = [sum(map(len, members[:i])) for i in range(31)]
    hit = {i for i in range(30) if starts[i] < at + 20 and at < starts[i + 1]}
    found = pages(bytes(data), compression)
    assert set(range(30)) - set(ids(found)) <= hit
    assert set(losses(found)) <= {"damaged_record", "truncated_file"}
    if compression == "gzip":  # has a checksum; zstd only when its writer added one
        assert set(range(30)) - set(ids(found)) == hit
        assert losses(found)


def test_junk_between_records_and_at_the_start():
    records = varied(6)
    data = (
        b"\x00junk" * 50
        + gzip.compress(records[0])
        + b"more junk"
        + b"".join(map(gzip.compress, records[1:]))
    )
    found = pages(data, "gzip")
    assert ids(found) == list(range(6))
    assert losses(found) == ["damaged_record"] * 2
    plain = pages(b"junk" + records[0] + b"more junk" + records[1])
    assert ids(plain) == [0, 1]
    assert losses(plain) == ["damaged_record"] * 2


def test_what_was_read_of_a_damaged_record_is_dropped():
    """The damage comes long after the record's beginning, which has been decompressed by then."""
    long = b"<html>" + random.Random(0).randbytes(400_000).hex().encode()
    for limit, reasons in ((LIMIT, ["damaged_record"]), (100_000, ["too_large", "damaged_record"])):
        damaged = bytearray(gzip.compress(record(1, long)))
        damaged[-100_000:-99_000] = b"\xff" * 1000
        found = pages(gzip.compress(record(0)) + bytes(damaged) + gzip.compress(record(2)), "gzip", limit)
        assert ids(found) == [0, 2]
        assert losses(found) == reasons


def test_what_only_looks_like_a_member_is_no_second_loss():
    junk = b"junk\x1f\x8b\x08\xff\xff\x1f\x8b\x08\xff\xff"
    found = pages(gzip.compress(record(0)) + junk + gzip.compress(record(1)), "gzip")
    assert ids(found) == [0, 1]
    assert losses(found) == ["damaged_record"]


def test_a_crawler_that_was_killed_and_started_again():
    """A member is cut, the next run's records follow it directly."""
    first, second, third = map(gzip.compress, varied(3))
    found = pages(first + second[: len(second) // 2] + third, "gzip")
    assert ids(found) == [0, 2]
    assert losses(found) == ["damaged_record"]


@pytest.mark.parametrize("header", [b"Content-Length: x", b"Content-Length: -5", b"X-Length: 50"])
def test_a_header_without_a_length(header):
    broken = re.sub(rb"Content-Length: \d+", header, record(1))
    found = pages(record(0) + broken + record(2))
    assert ids(found) == [0, 2]
    assert losses(found) == ["damaged_record"]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([None, "gzip", "zstd"]), st.floats(0, 1))
def test_a_truncated_file_keeps_all_before_the_cut(compression, share):
    members = [ONE_BY_ONE[compression]([r]) for r in varied(8)]
    data = b"".join(members)
    cut = int(share * len(data))
    whole = sum(sum(map(len, members[: i + 1])) <= cut for i in range(8))
    found = pages(data[:cut], compression)
    assert ids(found)[:whole] == list(range(whole))
    assert len(ids(found)) <= whole + 1  # the record may be complete before its last bytes, the line breaks
    at_border = cut in {sum(map(len, members[:i])) for i in range(9)}
    if compression and not cut:
        assert losses(found) == ["empty_file"]
    else:
        assert losses(found) == ([] if at_border else ["truncated_file"]) or len(ids(found)) == whole + 1


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([None, "gzip", "zstd"]), st.binary(max_size=300))
def test_no_bytes_raise(compression, data):
    pages(data, compression)
    found = pages(ONE_BY_ONE[compression]([record(1)]) + data, compression)
    assert ids(found)[:1] == [1]


def test_the_memory_does_not_grow_with_the_file():
    member = gzip.compress(record(1, HTML * 2000))
    peaks = []
    for repeats in (10, 160):
        stream = io.BytesIO(member * repeats)
        tracemalloc.start()
        assert sum(1 for _ in read_pages(stream, "gzip", LIMIT)) == repeats
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_the_memory_of_a_file_compressed_as_a_whole():
    one = record(1, b"<html>" + random.Random(0).randbytes(500_000))
    stream = io.BytesIO(gzip.compress(one * 30, 1))
    tracemalloc.start()
    assert sum(1 for _ in read_pages(stream, "gzip", LIMIT)) == 30
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


def test_the_sample_of_a_real_crawl(shared_dir):
    data = (shared_dir / "data/web/sample.warc.gz").read_bytes()
    found = pages(data, "gzip")
    responses = [page for page in found if isinstance(page, Page)]
    assert len(responses) == len({page.record_id for page in responses}) == 15
    assert responses[0].url == "https://creativecommons.org/"  # wget writes <...> around it
    assert all(page.html.rstrip().endswith(b"</html>") for page in responses)
    assert Counter(item.reason for item in found if isinstance(item, Skipped)) == {
        "request": 15,
        "warcinfo": 1,
        "metadata": 1,
        "resource": 2,  # wget's own notes
    }
    assert found == pages(gzip.decompress(data), None)


# --- As documents ------------------------------------------------------------------------------------------------------


def web_page(number: int, words: str) -> bytes:
    """One WARC response with an HTML page of these words."""
    body = f"<html><body><div><article><p>{words}</p></article></div></body></html>".encode()
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + body
    header = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:{number}>\r\n"
        f"WARC-Target-URI: http://example.com/{number}\r\nContent-Type: application/http; msgtype=response\r\n"
        f"Content-Length: {len(http)}\r\n\r\n"
    )
    return header.encode() + http + b"\r\n\r\n"


WARC_TEXTS = [f"The page number {i} has some wörds of its own, 中文 too. " * 5 for i in range(12)]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "a.warc.zst"])
@pytest.mark.parametrize("place", ["local", "s3"])
def test_the_pages_of_a_warc_are_documents(tmp_path, s3_url, name, place):
    pack = {"c": bytes, "z": gzip.compress, "t": zstandard.compress}[name[-1]]
    data = b"".join(pack(web_page(i, text)) for i, text in enumerate(WARC_TEXTS))
    url = f"{s3_url}/{name}" if place == "s3" else str(tmp_path / name)
    write_bytes(url, data)
    (file,) = list_inputs([url])
    rejects = Rejects()
    part = Part(file, file.size)
    found = list(read_documents(part, rejects, ReadOptions(text_field="body")))
    assert [r.fields["id"] for r in read_records(part, Rejects())] == [f"<urn:uuid:{i}>" for i in range(12)]
    assert [d.text for d in found] == [text.strip() for text in WARC_TEXTS]
    assert [d.url for d in found] == [f"http://example.com/{i}" for i in range(12)]
    assert [d.place for d in found] == [f"{url}:{i + 1}" for i in range(12)]
    assert not rejects.counts
    assert not rejects.skipped


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
def test_both_extractors_read_the_real_sample(shared_dir, extractor):
    (file,) = list_inputs([str(shared_dir / "data/web/sample.warc.gz")])
    rejects = Rejects()
    part = Part(file, file.size)
    found = list(read_documents(part, rejects, ReadOptions(extractor=extractor)))
    assert len(found) == 15
    assert sum(d.url == "https://allenai.org/" for d in found) == 3
    assert "Creative Commons is an international nonprofit organization" in found[0].text
    assert not rejects.counts
    assert dict(rejects.skipped) == {"request": 15, "warcinfo": 1, "metadata": 1, "resource": 2}


def test_warc_records_that_are_no_documents_are_counted(tmp_path, read):
    records = [
        web_page(0, WARC_TEXTS[0]),
        web_page(1, WARC_TEXTS[1]).replace(b"200 OK", b"404 NO"),
        web_page(2, WARC_TEXTS[2]).replace(b"text/html", b"image/png"),
        web_page(3, ""),
        web_page(4, "<div>" * 5000),
        web_page(5, "x" * 60_000),
        web_page(6, WARC_TEXTS[6]),
    ]
    path = tmp_path / "a.warc.gz"
    data = b"".join(map(gzip.compress, records))
    path.write_bytes(data[:-20])
    texts, rejects = read(path, max_record_bytes=50_000)
    assert texts == [WARC_TEXTS[0].strip()]
    assert dict(rejects.skipped) == {"not_200": 1, "not_html": 1, "no_main_content": 1}
    assert dict(rejects.counts) == {"extraction_failed": 1, "too_large": 1, "truncated_file": 1}
    assert [(e["reason"], e["line"]) for e in rejects.examples] == [
        ("extraction_failed", 5),
        ("too_large", 6),
        ("truncated_file", 7),
    ]


# --- Other kinds of WARC -----------------------------------------------------------------------------------------------


def stored(
    number: int, kind: str, content_type: str | None, body: bytes, url: str = "http://example.com/"
) -> bytes:
    """A record that holds a thing itself, without HTTP."""
    fields = [
        "WARC/1.0",
        f"WARC-Type: {kind}",
        f"WARC-Target-URI: {url}{number}",
        "WARC-Date: 2024-02-20T21:04:32Z",
        f"WARC-Record-ID: <urn:uuid:{number}>",
        *([f"Content-Type: {content_type}"] if content_type else []),
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*fields, "", ""]).encode() + body + b"\r\n\r\n"


@pytest.mark.parametrize("kind", ["conversion", "resource"])
@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("text/plain", PlainText),
        (None, Page),  # as it begins
        ("text/plain; charset=ISO-8859-1", PlainText),
        ("text/html; charset=ISO-8859-1", Page),
        ("TEXT/HTML", Page),
        ("application/json", Skipped("not_html")),
        ("image/png", Skipped("not_html")),
    ],
)
def test_what_is_stored_without_http(kind, content_type, expected):
    (found,) = pages(stored(7, kind, content_type, HTML))
    if isinstance(expected, Skipped):
        assert found == expected
        return
    charset = "ISO-8859-1" if content_type and "charset" in content_type else None
    assert found == expected("<urn:uuid:7>", "http://example.com/7", HTML, charset, "2024-02-20T21:04:32Z")
    assert isinstance(pages(stored(7, kind, None, b"A < B, in words"))[0], PlainText)


def test_what_a_crawler_notes_for_itself_is_no_text():
    for url in ("metadata://gnu.org/wget.log", "urn:pageinfo:http://x.org/", "dns:example.com"):
        assert pages(stored(1, "resource", "text/plain", b"a note", url)) == [Skipped("resource")]
    assert isinstance(pages(stored(1, "resource", "text/plain", b"a text", "file:///a.txt"))[0], PlainText)


@pytest.mark.parametrize(
    "kind", ["request", "metadata", "warcinfo", "revisit", "continuation", "x-own", "Request"]
)
def test_every_other_type_is_counted_by_its_name(kind):
    assert pages(stored(1, kind, "text/plain", b"x") + record(2))[0] == Skipped(kind.lower())
    assert pages(stored(1, "", "text/plain", b"x") + record(2))[0] == Skipped("unknown_type")


def test_a_wet_file(tmp_path, read):
    """As Common Crawl has them: a warcinfo, then a conversion for each page."""
    texts = [f"Titel {i}\nEin Satz über 中文 und mehr.\n" for i in range(5)]
    records = [stored(9, "warcinfo", "application/warc-fields", b"software: x\r\n")]
    records += [stored(i, "conversion", "text/plain", text.encode()) for i, text in enumerate(texts)]
    records += [stored(5, "conversion", "text/plain", b" \n"), stored(6, "revisit", None, b"")]
    path = tmp_path / "CC-MAIN-0.warc.wet.gz"
    path.write_bytes(b"".join(map(gzip.compress, records)))
    found, rejects = read(path)
    assert found == [text.strip() for text in texts]
    assert not rejects.counts
    assert dict(rejects.skipped) == {"warcinfo": 1, "revisit": 1, "no_main_content": 1}
    (file,) = list_inputs([str(path)])
    first = next(read_records(Part(file, file.size), Rejects()))
    assert first.fields == {
        "id": "<urn:uuid:0>",
        "url": "http://example.com/0",
        "date": "2024-02-20T21:04:32Z",
        "text": texts[0].strip(),
    }


def clueweb(number: int, words: str, line_end: str = "\n") -> bytes:
    """A response as ClueWeb09 stores it: a draft's version, line feeds alone, an empty field."""
    html = f"<html><body><div><article><p>{words}</p></article></div></body></html>".encode("latin-1")
    http = (
        line_end.join(["HTTP/1.1 200 OK", "Content-Type: text/html; charset=iso-8859-1", "", ""]).encode()
        + html
    )
    fields = [
        "WARC/0.18",
        "WARC-Type: response",
        f"WARC-Target-URI: http://example.com/{number}",
        f"WARC-Record-ID: <urn:uuid:{number}>",
        f"WARC-TREC-ID: clueweb09-en0000-00-{number:05d}",
        "Content-Type: application/http;msgtype=response",
        "WARC-Identified-Payload-Type: ",
        f"Content-Length: {len(http)}",
    ]
    return line_end.join([*fields, "", ""]).encode() + http + line_end.encode() * 2


def test_no_byte_of_a_page_is_lost_to_its_line_ends():
    html = b"<html><body>\r\n\r\n\n\nHTTP/ and\n\n</body></html>\n"
    for line_end in ("\n", "\r\n"):
        whole = clueweb(1, "x", line_end)
        body = whole[whole.index(b"<html>") :].rstrip()
        length = int(re.search(rb"Content-Length: (\d+)", whole)[1])
        changed = whole.replace(body, html).replace(b"%d" % length, b"%d" % (length - len(body) + len(html)))
        (page,) = pages(changed)
        assert (page.html, page.charset) == (html, "iso-8859-1")


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_clueweb09(tmp_path, read, line_end, name):
    words = [f"The page number {i} has some wörds of its own. " * 5 for i in range(4)]
    records = [clueweb(i, text, line_end) for i, text in enumerate(words)]
    records.insert(0, records[0].replace(b"response", b"warcinfo", 1))
    path = tmp_path / name
    path.write_bytes(ONE_BY_ONE["gzip" if name.endswith("gz") else None](records))
    found, rejects = read(path)
    assert found == [text.strip() for text in words]
    assert (dict(rejects.counts), dict(rejects.skipped)) == ({}, {"warcinfo": 1})


def test_after_damage_a_record_of_any_version_is_found():
    for version in (b"WARC/0.17", b"WARC/0.18", b"WARC/1.1", b"WARC/2.0"):
        found = pages(
            record(0) + b"junk WARC/ and WARC/x" + record(1).replace(b"WARC/1.0", version) + record(2)
        )
        assert ids(found) == [0, 1, 2]
        assert losses(found) == ["damaged_record"]


def test_a_file_whose_zstd_dictionary_stands_in_its_first_frame(tmp_path, read):
    """As the Archive Team's *.warc.zst."""
    words = [f"The page number {i} has some words of its own. " * 5 for i in range(60)]
    records = [clueweb(i, text, "\r\n") for i, text in enumerate(words)]
    dictionary = zstandard.train_dictionary(2048, records)
    stored = zstandard.compress(dictionary.as_bytes())
    packer = zstandard.ZstdCompressor(dict_data=dictionary)
    path = tmp_path / "a.warc.zst"
    first = struct.pack("<II", 0x184D2A5D, len(stored)) + stored
    path.write_bytes(first + b"".join(map(packer.compress, records)))
    found, rejects = read(path)
    assert found == [text.strip() for text in words]
    assert not rejects.counts
