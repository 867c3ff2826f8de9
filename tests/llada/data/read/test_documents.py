"""llada/data/read/documents.py: records to documents, damaged and unreadable files."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llada.data.document import Document
from llada.data.outcomes import Rejects, Report
from llada.data.read import documents
from llada.data.read.dialogues import read_dialogues
from llada.data.read.documents import UnreadableFileError, patiently, read, read_documents
from llada.data.read.listing import list_inputs
from llada.data.read.parts import InputFile, Part, ReadOptions


def lines(*records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def parts(*paths):
    return [Part(file, file.size) for file in list_inputs([str(path) for path in paths])]


def test_places(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "x", "id": 7}, {"text": "x"}, {"text": "x"}))
    (part,) = parts(path)
    found = list(read_documents(part, Rejects(), ReadOptions()))
    assert found == [Document("x", f"{path}:{line}") for line in (1, 2, 3)]
    (second,) = read_documents(Part(part.file, 1, 22, 30), Rejects(), ReadOptions())
    assert second.place == f"{path}#22-30:1"


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
        found = list(read_documents(Part(file, 1), Rejects(), ReadOptions()))
        assert [(d.text, d.url) for d in found] == list(zip("abcde", expected, strict=True))


def test_damaged_files_are_named_and_give_what_is_sound(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "a"}, {"body": 1}))
    whole = gzip.compress(lines(*({"text": f"b{i}"} for i in range(3))))
    (tmp_path / "b.jsonl.gz").write_bytes(whole[:-5])
    report, rejects = Report(), Rejects()
    both = parts(tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz")
    found = [d.text for d in read(both, read_documents, ReadOptions(), report, rejects)]
    assert found == ["a", "b0", "b1", "b2"]
    assert report.damaged_files == [str(tmp_path / "b.jsonl.gz")]
    assert dict(rejects.counts) == {"missing_text": 1, "truncated_file": 1}
    assert list(report.seconds) == ["read"]
    skipped = read(both, read_documents, ReadOptions(), report, rejects, skip=frozenset([both[1].label]))
    assert [d.text for d in skipped] == ["a"]


def test_dialogues_are_read_the_same_way(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"prompt": "p", "response": "r"}))
    (found,) = read(parts(tmp_path / "a.jsonl"), read_dialogues, ReadOptions(), Report(), Rejects())
    assert [m["content"] for m in found.messages] == ["p", "r"]


def test_a_file_that_is_gone_or_has_changed_is_unreadable(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "a"}))
    both = parts(path)
    path.write_bytes(lines({"text": "another"}))
    with pytest.raises(UnreadableFileError, match=r"a\.jsonl cannot be read: it is gone, or has changed"):
        list(read(both, read_documents, ReadOptions(), Report(), Rejects()))


def test_a_store_that_fails_names_the_part_and_our_faults_stay_what_they_are(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}")

    def failing(error):
        def documents_of(part, rejects, options):
            yield Document("a")
            raise error

        return read(parts(path), documents_of, ReadOptions(), Report(), Rejects())

    with pytest.raises(UnreadableFileError) as raised:
        list(failing(TimeoutError("slow")))
    assert raised.value.part.label == str(path)
    with pytest.raises(ZeroDivisionError):
        list(failing(ZeroDivisionError()))


def test_patience_ends(monkeypatch):
    monkeypatch.setattr(documents, "_BACK_OFF_S", 0.001)
    asked = []

    def work(skip):
        asked.append(skip)
        if "bad" not in skip:
            raise UnreadableFileError(Part(InputFile("bad", "bad", 1, ""), 1), OSError("away"))
        return "done"

    assert patiently(work) == ("done", {"bad": "away"})
    assert asked == [frozenset()] * 3 + [frozenset({"bad"})]
