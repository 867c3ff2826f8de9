"""llada/data/read/csv_rows.py: rows of a table, and what a broken one costs."""

from __future__ import annotations

import csv
import io
import random

import pytest


@pytest.fixture
def read_csv(tmp_path, read):
    """read_csv(data, name, **options): (texts, rejects)."""

    def read_file(data, name="a.csv", **options):
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return read(tmp_path / name, **options)

    return read_file


@pytest.mark.parametrize(
    ("name", "data", "texts"),
    [
        ("a.csv", 'id,text,url\n1,"a ""quoted"" word\n\n second line, with a comma",x\n2,plain,\n', None),
        ("a.csv", '\ufefftext\r\n"one\r\ntwo"\r\nthree', ["one\r\ntwo", "three"]),
        ("a.csv", "id, text \n1,x\n\n\n2,y\n", ["x", "y"]),
        ("a.csv", "id;text\n1;a, b\n", ["a, b"]),
        ("a.csv", "id\ttext\n1\ta, b\n", ["a, b"]),
        ("a.csv", "id|text\n1|a, b\n", ["a, b"]),
        ("a.tsv", 'text\tlabel\nhi, there\t1\n"a\ttab"\t2\n', ["hi, there", "a\ttab"]),
        ("A.TSV", "text\n;\n", [";"]),
        ("a.csv", 'id,text\n1,"' + "x" * 200_000 + '"\n', ["x" * 200_000]),
        ("a.csv", "text\n", []),
    ],
)
def test_rows(read_csv, name, data, texts):
    found, rejects = read_csv(data, name)
    assert found == (['a "quoted" word\n\n second line, with a comma', "plain"] if texts is None else texts)
    assert not rejects.counts


def test_any_table_comes_back(read_csv):
    chosen = random.Random(0)
    rows = [["x" + "".join(chosen.choices('ab",;\n\t é', k=20)) for _ in range(3)] for _ in range(500)]
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["a", "text", "b"], *rows])
    found, rejects = read_csv(table.getvalue())
    assert found == [row[1] for row in rows]
    assert not rejects.counts


def test_a_broken_row_costs_itself(read_csv):
    data = 'id,text\n1,a,b\n2,good\n3\n4,"never closed\n5,fine\n6,"a" b\n7,"last\n'
    found, rejects = read_csv(data)
    assert found == ["good", "fine"]
    assert dict(rejects.counts) == {"wrong_number_of_fields": 2, "invalid_csv": 3}
    assert [(e["reason"], e["line"]) for e in rejects.examples] == [
        ("wrong_number_of_fields", 2),
        ("wrong_number_of_fields", 4),
        ("invalid_csv", 5),
        ("invalid_csv", 7),
        ("invalid_csv", 8),
    ]


def test_bytes_that_are_no_utf8_cost_their_row(read_csv):
    found, rejects = read_csv(b'id,text\n1,caf\xe9\n2,"a\n\xe9\nb"\n3,good\n')
    assert found == ["good"]
    assert rejects.counts["not_utf8"] == 2


def test_a_row_that_is_too_large(read_csv):
    data = 'id,text\n1,"' + "words\n" * 1000 + '"\n2,good\n'
    found, rejects = read_csv(data, max_record_bytes=1000)
    assert found == ["good"]
    assert rejects.counts["too_large"] == 1


def test_a_missing_column_is_answered_with_those_there(read_csv):
    found, rejects = read_csv("id,content\n1,x\n2,y\n")
    assert (found, dict(rejects.counts)) == ([], {"missing_text": 1})
    assert rejects.faults[0]["why"].startswith("no field 'text', but 'id', 'content'; see")
    assert read_csv("id,content\n1,x\n2,y\n", text_field="content")[0] == ["x", "y"]
    wide = ",".join(f"column{number}" for number in range(50))
    assert "'column9'" in read_csv(wide + "\n")[1].faults[0]["why"]
