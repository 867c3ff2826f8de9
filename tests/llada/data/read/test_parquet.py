"""llada/data/read/parquet.py"""

import datetime
import decimal
import itertools
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llada.data.outcomes import Rejects
from llada.data.read.formats import read_records
from llada.data.read.parts import InputFile, Part, ReadOptions


def test_damaged_parquet(tmp_path, read):
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
    assert rejects.file_problems()[str(path)].startswith("damaged_row_group: parquet error")
    path.write_bytes(data[:-100])
    texts, rejects = read(path)
    assert not texts
    assert dict(rejects.counts) == {"damaged_file": 1}
    assert str(path) in rejects.examples[0]["source"]


def test_each_broken_piece_is_counted_once_however_the_file_is_cut(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{i}" * 50 for i in range(300)]}), path, row_group_size=100)
    data = path.read_bytes()
    offset = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    group_lost = data[: offset + 4] + b"\xff" * 20 + data[offset + 24 :]
    footer_lost = data[:-20] + b"\xff" * 12 + data[-8:]
    for damaged, counts in ((group_lost, {"damaged_row_group": 100}), (footer_lost, {"damaged_file": 1})):
        path.write_bytes(damaged)
        file, rejects, found = InputFile(str(path), "a", len(data), ""), Rejects(), 0
        for start, end in itertools.pairwise([0, offset - 50, offset + 1, offset + 50, None]):
            found += sum(1 for _ in read_records(Part(file, 1, start, end), rejects))
        assert dict(rejects.counts) == counts
        assert found + rejects.counts.total() == (300 if "damaged_row_group" in counts else 1)


FLIPS = """
import random, sys
from llada.data.outcomes import Rejects
from llada.data.read.documents import read_documents
from llada.data.read.parts import InputFile, Part, ReadOptions

path, step = sys.argv[1], int(sys.argv[2])
data, rng = open(path, "rb").read(), random.Random(0)
file = InputFile(path, "a", len(data), "")
texts = {d.text for d in read_documents(Part(file, 1), Rejects(), ReadOptions())}
for at in range(0, len(data), step):
    damaged = bytearray(data)
    damaged[at] ^= 1 << rng.randrange(8)
    with open(path, "wb") as stream:
        stream.write(damaged)
    rejects = Rejects()
    found = [d.text for d in read_documents(Part(file, 1), rejects, ReadOptions())]
    if not set(found) <= texts or (len(found) < len(texts) and not rejects.counts):
        print("silent", at, len(found), rejects.counts)
"""


def test_a_flipped_byte_raises_nothing_and_alters_no_text_whose_page_has_a_checksum(tmp_path):
    """In a process of its own, because damage may be the end of pyarrow."""
    path = tmp_path / "a.parquet"
    rng = random.Random(3)
    words = ["%x" % rng.getrandbits(24) for _ in range(100)]  # noqa: UP031
    table = pa.table({"text": [" ".join(rng.choices(words, k=40)) for _ in range(300)], "id": range(300)})
    pq.write_table(table, path, row_group_size=100, compression="zstd", write_page_checksum=True)
    step = str(path.stat().st_size // 150)
    done = subprocess.run(
        [sys.executable, "-c", FLIPS, str(path), step],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_parquet_rows_with_bad_text(tmp_path, read):
    path = tmp_path / "a.parquet"
    # A string column whose second value is no UTF-8.
    column = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"text": pa.concat_arrays([column, pa.array(["b", None])])}), path)
    texts, rejects = read(path)
    assert texts == ["a", "b"]
    assert dict(rejects.counts) == {"not_utf8": 1, "null_text": 1}


def test_a_missing_column_is_answered_with_those_that_are_there(tmp_path, read):
    path = tmp_path / "a.parquet"
    table = pa.table({"body": ["a", "b", "c"], "meta": [{"n": 1}] * 3, "id": [1, 2, 3]})
    pq.write_table(table, path, row_group_size=2)
    texts, rejects = read(path)
    assert not texts
    assert dict(rejects.counts) == {"missing_text": 3}
    told = rejects.file_problems()[str(path)]
    assert told.startswith("missing_text: no field 'text', but 'body', 'meta', 'id'; see read.text_field")
    assert read(path, text_field="body")[0] == ["a", "b", "c"]
    assert read(path, text_field="meta.text")[1].counts == {"missing_text": 3}
    pq.write_table(table.slice(0, 0), path)
    assert not read(path)[1].counts  # no row lacks it


FAR = 10**15  # seconds: beyond the year 9999
ODD = {
    "timestamps": pa.array([FAR, None, -FAR], pa.timestamp("s")),
    "zones": pa.array([0, 1, 2], pa.timestamp("us", tz="Mars/Olympus")),
    "dates": pa.array([2**30, 1, 2], pa.date32()),
    "durations": pa.array([2**62, 1, 2], pa.duration("us")),
    "decimals": pa.array([decimal.Decimal("1e37"), None, decimal.Decimal(1)], pa.decimal256(70, 2)),
    "maps": pa.array([[("a", FAR)], [], None], pa.map_(pa.string(), pa.timestamp("s"))),
    "categories": pa.array(["x", "y", "x"]).dictionary_encode(),
    "uuids": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)] * 3, pa.binary(16))),
    "structs": pa.array([{"when": FAR}, {"when": 0}, None], pa.struct([("when", pa.timestamp("s"))])),
    "nothing": pa.nulls(3),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_not_asked_for_is_not_converted(tmp_path, read, name):
    """Nor does it cost a row when it is asked for, beside the text, and Python cannot express it."""
    path = tmp_path / "a.parquet"
    for column in (name, "id", "url"):
        pq.write_table(pa.table({"text": ["a", "b", "c"], column: ODD[name]}), path)
        texts, rejects = read(path)
        assert texts == ["a", "b", "c"]
        assert not rejects.counts
    whole = [record.fields for record in read_records(Part(InputFile(str(path), "a", 1, ""), 1), Rejects())]
    assert [fields["text"] for fields in whole] == ["a", "b", "c"]


@pytest.mark.parametrize("name", [name for name in ODD if name != "categories"])
def test_a_text_column_that_holds_no_text_is_counted(tmp_path, read, name):
    pq.write_table(pa.table({"text": ODD[name]}), tmp_path / "a.parquet")
    texts, rejects = read(tmp_path / "a.parquet")
    assert not texts
    assert set(rejects.counts) <= {"text_not_a_string", "null_text"}
    assert rejects.counts.total() == 3


@pytest.mark.parametrize(
    ("column", "texts", "counts"),
    [
        (pa.array(["a", None, "é"], pa.large_string()), ["a", "é"], {"null_text": 1}),
        (pa.array(["a", None, "é"], pa.string_view()), ["a", "é"], {"null_text": 1}),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"], {}),
        (pa.array([b"a", b"\xc3\xa9", b"\xe9"]), ["a", "é"], {"not_utf8": 1}),
        (pa.array([b"a", None, b"\xe9"], pa.large_binary()), ["a"], {"null_text": 1, "not_utf8": 1}),
        (pa.array([["a", "b"], ["c", None], []]), ["a\nb", "c"], {"text_not_a_string": 1}),
        (pa.array([["a"], None, ["é"]], pa.large_list(pa.large_string())), ["a", "é"], {"null_text": 1}),
        (pa.array([[b"a", b"b"], [b"\xff"], None]), ["a\nb"], {"not_utf8": 1, "null_text": 1}),
        (pa.array([1, 2, None]), [], {"text_not_a_string": 2, "null_text": 1}),
        (pa.array([1.5, True, None], pa.float64()), [], {"text_not_a_string": 2, "null_text": 1}),
        (pa.array([[1], [2], [3]]), [], {"text_not_a_string": 3}),
    ],
)  # fmt: skip
def test_types_of_text(tmp_path, read, column, texts, counts):
    path = tmp_path / "a.parquet"
    nested = pa.StructArray.from_arrays([column, pa.array([FAR] * 3, pa.timestamp("s"))], ["b", "when"])
    pq.write_table(pa.table({"text": column, "a": nested}), path)
    for field in ("text", "a.b"):
        found, rejects = read(path, text_field=field)
        assert found == texts
        assert dict(rejects.counts) == counts


def test_binary_text_in_another_encoding(tmp_path, read):
    pq.write_table(pa.table({"text": [b"caf\xe9", b"\x81"]}), tmp_path / "a.parquet")
    texts, rejects = read(tmp_path / "a.parquet", encoding="cp1252")
    assert texts == ["café"]
    assert dict(rejects.counts) == {"undecodable": 1}


def test_a_column_with_a_point_in_its_name_comes_before_a_field_of_another(tmp_path, read):
    path = tmp_path / "a.parquet"
    nested = [{"b": {"c": "deep", "n": 1}}]
    pq.write_table(pa.table({"a": nested, "a.b.c": ["flat"], "when": [datetime.datetime(2020, 1, 1)]}), path)
    assert read(path, text_field="a.b.c")[0] == ["flat"]
    pq.write_table(pa.table({"a": nested, "when": [FAR]}), path)
    assert read(path, text_field="a.b.c")[0] == ["deep"]
    options = ReadOptions(text_field="a.b.c", columns=("a.b.c",))
    (record,) = read_records(Part(InputFile(str(path), "a", 1, ""), 1), Rejects(), options)
    assert record.fields == {"a": {"b": {"c": "deep"}}}  # no more than that


def test_too_large_rows(tmp_path, read):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [["x" * 60, "y" * 60], ["x" * 60]], "id": ["1", "2"]}), path)
    texts, rejects = read(path, max_record_bytes=100)
    assert texts == ["x" * 60]
    assert dict(rejects.counts) == {"too_large": 1}
