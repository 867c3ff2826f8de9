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

from llada.data import documents
from llada.data.documents import InputFile, Part, Rejects, expand_inputs, read_documents, read_records


def read(path, **options):
    """(texts, rejects) of a whole file, or of a piece of it."""
    (file,) = expand_inputs([str(path)])
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
    (file,) = expand_inputs([str(path)])
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


def test_expand_inputs(tmp_path):
    for name in (
        "b/2.jsonl",
        "b/1.txt",
        "b/README.md",
        "b/_hidden.jsonl",
        "b/.x/3.jsonl",
        "a.parquet",
        "c.csv",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(*inputs):
        return [file.name for file in expand_inputs([str(tmp_path / i) for i in inputs])]

    assert names("b") == ["1.txt", "2.jsonl"]
    assert names("b/*.jsonl", "a.parquet") == ["2.jsonl", "a.parquet"]
    assert names("b/1.txt", "b") == ["1.txt", "2.jsonl"]  # a file named twice is read once
    for bad, error, message in (
        ("none.txt", FileNotFoundError, "no such file"),
        ("none*.txt", FileNotFoundError, "no such file"),
        ("c.csv", ValueError, r"must end in one of \.jsonl"),
        ("c*", ValueError, "must end in"),
    ):
        with pytest.raises(error, match=message):
            names(bad)


def test_the_development_data(shared_dir):
    folder = shared_dir / "data/text"
    assert len(read(folder / "tinystories.txt")[0]) == 1350
    assert len(read(folder / "c4_200.jsonl.gz")[0]) == 200
    code = Path("code/thealgorithms.parquet")
    assert read(folder / code)[0] == read(folder / code.with_suffix(".jsonl.zst"))[0]
