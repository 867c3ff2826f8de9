"""llada/data/read/stream.py: damaged streams, and files that are read in pieces."""

import gzip
import itertools
import json

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from llada.data.outcomes import Rejects
from llada.data.read import stream
from llada.data.read.formats import read_records
from llada.data.read.parts import InputFile, Part, ReadOptions


def lines(*records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_truncated_file_loses_only_its_end(tmp_path, read, suffix):
    data = lines(*({"text": f"{i} " * 200} for i in range(500)))
    whole = gzip.compress(data) if suffix == "gz" else zstandard.compress(data)
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(whole[: len(whole) * 9 // 10])
    texts, rejects = read(path)
    assert texts == [f"{i} " * 200 for i in range(len(texts))]
    assert len(texts) > 50
    assert dict(rejects.counts) == {"truncated_file": 1}
    assert rejects.examples[0]["source"] == str(path)


def test_a_compressed_file_that_is_none(tmp_path, read):
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"not compressed at all\n")
        texts, rejects = read(tmp_path / name)
        assert not texts
        assert dict(rejects.counts) == {"damaged_file": 1}


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
        patch.setattr(stream, "_READ_BYTES", buffer)
        rejects, found = Rejects(), []
        for start, end in itertools.pairwise(borders):
            part = Part(file, 1, start, end)
            found += [r.fields["text"] for r in read_records(part, rejects, ReadOptions(max_record_bytes=40))]
    sizes = [len(json.dumps({"text": "x" + text})) for text in records]
    assert found == ["x" + text for text, size in zip(records, sizes, strict=True) if size <= 40]
    assert rejects.counts["too_large"] == sum(size > 40 for size in sizes)
