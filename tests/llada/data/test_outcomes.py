"""llada/data/outcomes.py: what is noted of documents and records, its JSON form, and sums."""

import json
from dataclasses import asdict

import pytest

from llada.data.document import Document
from llada.data.outcomes import KEPT, SAMPLES_PER_OUTCOME, Rejects, Report, merge, timed


def report_of(*numbers, source="a"):
    report = Report(source, 1, 10)
    for number in numbers:
        report.add("url.domain", Document(f"text {number}", f"s3://x:{number}", language="en"), number, 5)
        report.add(KEPT, Document(f"kept {number} é", language="de"))
        report.add_edits("email", number)
    return report


def test_the_form_in_which_it_is_stored():
    """Its order of fields too: units/<name>.json of earlier runs are read, and compared byte for byte."""
    report = report_of(3)
    report.add_length("tokens", 9)
    stored = json.dumps(asdict(report))
    assert stored == (
        '{"source": "a", "units": 1, "input_bytes": 10, '
        '"outcomes": {"en": {"url.domain": [1, 6]}, "de": {"kept": [1, 9]}}, "rejected": {}, "skipped": {}, '
        '"edits": {"email": 3}, "histograms": {"characters": {"3": 1}, "tokens": {"3": 1}}, '
        '"samples": {"url.domain": [{"hash": "0a0feb68948907f9", "text": "text 3", "value": 3, "limit": 5, '
        '"place": "s3://x:3", "language": "en"}], "kept": [{"hash": "592e999c8f9092a8", "text": "kept 3 \\u00e9", '
        '"value": null, "limit": null, "place": "", "language": "de"}]}, "matches": [], "left_out": {}, "damaged_files": [], '
        '"unreadable_files": [], "file_problems": {}, "splits": {}, "seconds": {}, "tokenizer": {}}'
    )
    assert Report(**json.loads(stored)) == report


def test_sums_do_not_depend_on_the_order():
    parts = [report_of(1, 2, 3), report_of(4, 5, 6), report_of(7)]
    total = merge(parts)
    assert total.documents() == 14
    assert total.documents(KEPT) == 7
    assert total.refused() == {"url.domain": 7}
    assert total.edits == {"email": 28}
    assert (total.units, total.input_bytes, total.source) == (3, 30, "a")
    assert len(total.samples[KEPT]) == SAMPLES_PER_OUTCOME
    assert merge(reversed(parts)).samples == total.samples
    assert merge([merge(parts[:2]), parts[2]]) == total
    assert merge([parts[0], report_of(1, source="b")]).source == ""
    assert merge([]) == Report()


def test_a_sample_shows_what_it_is_told_to():
    report = Report()
    report.add("too_long", Document("secret"), shown="s…")
    assert report.samples["too_long"][0]["text"] == "s…"
    assert report.outcomes["und"]["too_long"] == [1, 6]


def test_rejects_count_everything_and_keep_the_first():
    rejects = Rejects()
    rejects.add("not_utf8", "s3://a", 1, b"\xff" + b"x" * 300)
    rejects.add("damaged_row_group", "s3://a", 2, "\ud800", count=100)
    for line in range(300):
        rejects.add("too_large", "s3://a", line)
    assert rejects.counts == {"not_utf8": 1, "damaged_row_group": 100, "too_large": 300}
    assert len(rejects.examples) == 200
    assert rejects.examples[0] == {
        "reason": "not_utf8", "source": "s3://a", "line": 1, "text": "\ufffd" + "x" * 199,
    }  # fmt: skip
    assert list(rejects.examples[0]) == ["reason", "source", "line", "text"]  # as quarantine/ spells it
    assert rejects.examples[1]["text"] == "?"


def test_what_is_wrong_with_a_file_is_counted_and_told():
    rejects = Rejects()
    rejects.add_fault("damaged_file", "s3://a", "invalid distance", doubtful=58)
    rejects.add_fault("trailing_garbage", "s3://a", "no data at byte 90")
    rejects.add_fault("damaged_file", "s3://a", "invalid code", doubtful=1000)
    rejects.add_fault("missing_text", "s3://b", "no column text", lost=10)
    assert rejects.counts == {"damaged_file": 2, "trailing_garbage": 1, "missing_text": 10}
    assert [e["text"] for e in rejects.examples][2:] == ["invalid code", "no column text"]
    assert rejects.file_problems() == {
        "s3://a": "damaged_file: invalid distance (2 times; of the records that were used, 1,058 at most may be "
        "altered); trailing_garbage: no data at byte 90",
        "s3://b": "missing_text: no column text (10 times)",
    }
    reports = [Report(file_problems={"a": "x"}), Report(), Report(file_problems={"b": "y"})]
    assert merge(reports).file_problems == {"a": "x", "b": "y"}


def test_a_step_is_charged_for_its_own_time(monkeypatch):
    clock = iter([0.0, 0.0, 5.0, 7.0, 7.0, 7.0, 8.0, 9.0])
    monkeypatch.setattr("llada.data.outcomes.time.thread_time", lambda: next(clock))
    report = Report()
    inner = timed(iter(["a"]), "read", report)
    assert list(timed(inner, "filter", report)) == ["a"]
    assert report.seconds == {"read": pytest.approx(6.0), "filter": pytest.approx(3.0)}
