import gzip
import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from llada.data.read import formats as documents
from llada.data.read.formats import InputFile, Part, Rejects, read_documents, read_records
from llada.data.read.listing import list_inputs
from llada.files import write_bytes


def read(path, **options):
    """(texts, rejects) of a whole file, or of a piece of it."""
    (file,) = list_inputs([str(path)])
    rejects = Rejects()
    settings = {"text_field": "text", "max_record_bytes": 1 << 20} | options
    part = Part(file, file.size, settings.pop("start", 0), settings.pop("end", None))
    return [document.text for document in read_documents(part, rejects, **settings)], rejects


def lines(*records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


TEXTS = [f"text {i} é\n" for i in range(50)]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.ndjson", "a.json.gz"]
)
def test_every_format_gives_the_same_texts(tmp_path, name):
    data, path = lines(*({"text": text} for text in TEXTS)), tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": TEXTS, "other": range(50)}), path, row_group_size=20)
    elif name.endswith("gz"):
        path.write_bytes(
            gzip.compress(data[:100]) + gzip.compress(data[100:])
        )  # two members, as pigz and logs have
    elif name.endswith("zst"):
        path.write_bytes(zstandard.compress(data[:100]) + zstandard.compress(data[100:]))
    else:
        path.write_bytes(data)
    texts, rejects = read(path)
    assert texts == TEXTS
    assert not rejects.counts


def test_ids_and_sources(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "x", "id": 7}, {"text": "x"}, {"text": "x"}))
    (file,) = list_inputs([str(path)])
    found = list(read_documents(Part(file, 1), Rejects(), text_field="text", max_record_bytes=100))
    assert [d.source for d in found] == [f"{path}:{line}" for line in (1, 2, 3)]
    assert found[0].id == "7"
    assert found[1].id == found[2].id != "7"


def test_text_files(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbfa whole\r\nbook\n")
    (tmp_path / "many.txt").write_bytes(b"first\n<|endoftext|>\nsecond<|endoftext|>\n")
    assert read(tmp_path / "one.txt")[0] == ["a whole\r\nbook\n"]
    assert read(tmp_path / "many.txt")[0] == ["first\n", "\nsecond"]


def test_bad_records_are_counted_and_kept_as_examples(tmp_path):
    bad = {
        "invalid_json": b'{"text": "x"',
        "not_utf8": b'{"text": "\xff"}',
        "null_text": b'{"text": null}',
        "missing_text": b'{"body": "x"}',
        "text_not_a_string": b'{"text": 5}',
        "empty_text": b'{"text": " \\n"}',
        "nul_character": b'{"text": "a\\u0000b"}',
        "not_an_object": b'["text"]',
        "too_large": b'{"text": "' + b"x" * 500 + b'"}',
    }
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\n".join([b'{"text": "good"}', *bad.values(), b'{"text": "\\ud800"}', b'{"text": "last"}'])
    )
    texts, rejects = read(path, max_record_bytes=200)
    assert texts == ["good", "last"]
    assert dict(rejects.counts) == dict.fromkeys(bad, 1) | {"not_utf8": 2}
    assert [e["line"] for e in rejects.examples] == list(range(2, 12))
    assert all(e["source"] == str(path) and len(e["text"]) <= 200 for e in rejects.examples)
    json.dumps(rejects.examples, ensure_ascii=False).encode()  # can be written as it is


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_truncated_file_loses_only_its_end(tmp_path, suffix):
    data = lines(*({"text": f"{i} " * 200} for i in range(500)))
    whole = gzip.compress(data) if suffix == "gz" else zstandard.compress(data)
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(whole[: len(whole) * 9 // 10])
    texts, rejects = read(path)
    assert texts == [f"{i} " * 200 for i in range(len(texts))]
    assert len(texts) > 50
    assert dict(rejects.counts) == {"truncated_file": 1}
    assert rejects.examples[0]["source"] == str(path)


def test_a_compressed_file_that_is_none(tmp_path):
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"not compressed at all\n")
        texts, rejects = read(tmp_path / name)
        assert not texts
        assert dict(rejects.counts) == {"damaged_file": 1}


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"{i}" * 50 for i in range(300)]}), path, row_group_size=100, compression="zstd"
    )
    data = path.read_bytes()
    offset = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    path.write_bytes(data[: offset + 30] + bytes(200) + data[offset + 230 :])
    texts, rejects = read(path)
    assert texts == [f"{i}" * 50 for i in [*range(100), *range(200, 300)]]
    assert dict(rejects.counts) == {"damaged_row_group": 100}
    path.write_bytes(data[:-100])
    texts, rejects = read(path)
    assert not texts
    assert dict(rejects.counts) == {"damaged_file": 1}
    assert str(path) in rejects.examples[0]["source"]


def test_parquet_rows_with_bad_text(tmp_path):
    path = tmp_path / "a.parquet"
    column = pa.Array.from_buffers(  # a string column whose second value is no UTF-8
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"text": pa.concat_arrays([column, pa.array(["b", None])])}), path)
    texts, rejects = read(path)
    assert texts == ["a", "b"]
    assert dict(rejects.counts) == {"not_utf8": 1, "null_text": 1}
    assert read(path, text_field="body")[1].counts == {"missing_text": 4}


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(st.text(st.sampled_from("ab\u00e9"), max_size=12), max_size=15),
    cuts=st.lists(st.integers(0, 200), max_size=4),
    ends_with_newline=st.booleans(),
    buffer=st.integers(1, 40),
)
def test_pieces_of_a_file_hold_every_record_once(tmp_path_factory, records, cuts, ends_with_newline, buffer):
    """Wherever a file is cut, and however it arrives in the buffer, no line is lost or read twice."""
    path = tmp_path_factory.mktemp("pieces") / "a.jsonl"
    data = lines(*({"text": "x" + text} for text in records))
    path.write_bytes(data if ends_with_newline else data.rstrip(b"\n"))
    file = InputFile(str(path), "a.jsonl", len(data), "")
    borders = [0, *sorted(cuts), None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_READ_BYTES", buffer)
        rejects, found = Rejects(), []
        for start, end in itertools.pairwise(borders):
            part = Part(file, 1, start, end)
            found += [r.fields["text"] for r in read_records(part, rejects, max_record_bytes=40)]
    sizes = [len(json.dumps({"text": "x" + text})) for text in records]
    assert found == ["x" + text for text, size in zip(records, sizes, strict=True) if size <= 40]
    assert rejects.counts["too_large"] == sum(size > 40 for size in sizes)


def test_the_development_data(shared_dir):
    folder = shared_dir / "data/text"
    assert len(read(folder / "tinystories.txt")[0]) == 1350
    assert len(read(folder / "c4_200.jsonl.gz")[0]) == 200
    code = Path("code/thealgorithms.parquet")
    assert read(folder / code)[0] == read(folder / code.with_suffix(".jsonl.zst"))[0]


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
    found = list(read_documents(Part(file, file.size), rejects, text_field="body", max_record_bytes=1 << 20))
    assert [d.text for d in found] == [text.strip() for text in WARC_TEXTS]
    assert [d.id for d in found] == [f"<urn:uuid:{i}>" for i in range(12)]
    assert [d.url for d in found] == [f"http://example.com/{i}" for i in range(12)]
    assert [d.source for d in found] == [f"{url}:{i + 1}" for i in range(12)]
    assert not rejects.counts
    assert not rejects.skipped


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
def test_both_extractors_read_the_real_sample(shared_dir, extractor):
    (file,) = list_inputs([str(shared_dir / "data/web/sample.warc.gz")])
    rejects = Rejects()
    part = Part(file, file.size)
    found = list(
        read_documents(part, rejects, text_field="text", max_record_bytes=1 << 24, extractor=extractor)
    )
    assert len(found) == 15
    assert sum(d.url == "https://allenai.org/" for d in found) == 3
    assert "Creative Commons is an international nonprofit organization" in found[0].text
    assert not rejects.counts
    assert not rejects.skipped


def test_warc_records_that_are_no_documents_are_counted(tmp_path):
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


def test_urls_of_records(tmp_path):
    records = [
        {"text": "a", "url": "http://a.org/"},
        {"text": "b", "metadata": {"url": "http://b.org/", "length": 3}},
        {"text": "c", "url": None, "metadata": {"url": "http://c.org/"}},
        {"text": "d", "metadata": {"length": 3}},
        {"text": "e", "url": 5, "metadata": "http://e.org"},
    ]
    expected = ["http://a.org/", "http://b.org/", "http://c.org/", None, None]
    (tmp_path / "a.jsonl").write_bytes(lines(*records))
    rows = [
        {**r, "metadata": r["metadata"] if isinstance(r.get("metadata"), dict) else None} for r in records
    ]
    rows = [{**r, "url": r.get("url") if isinstance(r.get("url"), str) else None} for r in rows]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        (file,) = list_inputs([str(tmp_path / name)])
        found = list(read_documents(Part(file, 1), Rejects(), text_field="text", max_record_bytes=1000))
        assert [(d.text, d.url) for d in found] == list(zip("abcde", expected, strict=True))
