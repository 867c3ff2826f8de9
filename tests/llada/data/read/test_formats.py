"""llada/data/read/formats.py: the table of readers, and what it says of names of files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llada.data.read.compression import COMPRESSIONS
from llada.data.read.formats import (
    READERS,
    ending_of,
    find_reader,
    is_divisible,
    may_be_empty,
    reader_of,
    supported,
)
from llada.errors import UserError


def lines(*records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


TEXTS = [f"text {i} é\n" for i in range(50)]


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.jsonl.gz",
        "a.jsonl.zst",
        "a.parquet",
        "a.ndjson",
        "a.json",
        "a.json.gz",
        "a.csv",
        "a.tsv.gz",
    ],
)
def test_every_format_gives_the_same_texts(tmp_path, read, name):
    data, path = lines(*({"text": text} for text in TEXTS)), tmp_path / name
    if ".csv" in name or ".tsv" in name:
        data = "".join(["text\n", *(f'"{text}"\n' for text in TEXTS)]).encode()
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": TEXTS, "other": range(50)}), path, row_group_size=20)
    elif name.endswith("gz"):
        # Two members, as pigz and logs have.
        path.write_bytes(gzip.compress(data[:100]) + gzip.compress(data[100:]))
    elif name.endswith("zst"):
        path.write_bytes(zstandard.compress(data[:100]) + zstandard.compress(data[100:]))
    else:
        path.write_bytes(data)
    texts, rejects = read(path)
    assert texts == TEXTS
    assert not rejects.counts


@pytest.mark.parametrize(
    ("name", "reader", "divisible"),
    [
        ("https://host/a.csv.gz?signature=x/y.txt", "csv", False),
        ("s3://b/A.JSONL", "json_lines", True),
        ("a.json.gz", "json", False),
        ("a.csv", "csv", False),
        ("a.tsv.zst", "csv", False),
        ("a.warc.wet.gz", "warc", False),
        ("a.txt", "text", False),
        ("a.txt.zst", "text", False),
        ("a.jsonl.bz2", "json_lines", False),
        ("a.jsonl.zstd", "json_lines", False),
        ("a.warc.xz", "warc", False),
        ("a.warc.gz", "warc", False),
        ("a.parquet", "parquet", True),
    ],
)
def test_a_file_is_read_by_its_name(name, reader, divisible):
    assert reader_of(name) is READERS[reader]
    assert is_divisible(name) is divisible


@pytest.mark.parametrize("name", ["a.docx", "a.parquet.gz", "a", "a.gz", "jsonl"])
def test_a_name_that_no_reader_knows(name):
    assert find_reader(name) is None
    with pytest.raises(UserError, match=rf"cannot read {name}: the file name must end in one of \.jsonl"):
        reader_of(name)


def test_what_is_supported_is_said_by_the_readers():
    assert supported() == (
        ".jsonl .ndjson (one object a line) .json (objects, or arrays of them) .csv .tsv (with a header) .txt "
        f".warc .wet (each also {' '.join(COMPRESSIONS)}) .parquet"
    )


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("x/README.md", "*.md"),
        ("x/a.tar.gz", "*.tar.gz"),
        ("x/a.jsonl.lz4", "*.jsonl.lz4"),
        ("x/A.TXT.BR", "*.txt.br"),
        ("x/v1.2.bin", "*.bin"),
        ("x.y/part-00000", "no suffix"),
        ("x/a.parquet.gz", "*.parquet.gz"),
    ],
)
def test_what_no_reader_knows_is_called_by_its_ending(name, ending):
    assert ending_of(name) == ending


def test_which_files_may_be_empty():
    names = ["a.jsonl", "a.csv", "a.warc", "a.jsonl.gz", "a.txt.zst", "a.parquet"]
    assert [may_be_empty(name) for name in names] == [True, True, True, False, False, False]


def test_no_two_readers_share_a_suffix():
    suffixes = [suffix for reader in READERS.values() for suffix in reader.suffixes]
    assert len(set(suffixes)) == len(suffixes)


def test_the_development_data(shared_dir, read):
    folder = shared_dir / "data/text"
    assert len(read(folder / "tinystories.txt")[0]) == 1350
    assert len(read(folder / "c4_200.jsonl.gz")[0]) == 200
    code = Path("code/thealgorithms.parquet")
    assert read(folder / code)[0] == read(folder / code.with_suffix(".jsonl.zst"))[0]
