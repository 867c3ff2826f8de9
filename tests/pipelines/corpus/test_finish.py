"""When a result is no good, and how the sums of snapshots are put together; without a cluster."""

import pytest

from llada.data.outcomes import Report
from llada.data.work.config import PrepareConfig
from llada.data.work.job import Job, Snapshot
from llada.data.work.units import Plan, read_plan
from llada.errors import UserError
from llada.files import write_bytes
from pipelines.corpus.finish import check, check_tokenizer, describe_left_out


def job_of(tmp_path, files=3, **changes):
    snapshot = Snapshot(str(tmp_path), 0)
    write_bytes(f"{snapshot.plan_url}/plan.json", b'{"units": 1, "files": 3, "bytes": 10, "id": "x"}')
    plan = Plan(snapshot.plan_url, 1, files, 10, "x")
    return Job(PrepareConfig(**changes), snapshot, plan).packing("hash")


def report(kept=10, rows=5, validation_rows=0, **fields):
    splits = {"train": {"rows": rows}, "validation": {"rows": validation_rows}}
    return Report(outcomes={"en": {"kept": [kept, 100]}}, splits=splits, **fields)


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (
            report(rejected={"invalid_json": 2}),
            r"2 of 12 records cannot be used \(invalid_json 2\); see .*quarantine",
        ),
        (report(unreadable_files=["a", "b#0-5", "b#5-"]), "2 of 3 files could not be read, a among them"),
        (
            report(rejected={"not_utf8": 2}, file_problems={"a.txt": "not_utf8: set read.encoding"}),
            r"2 of 12 records cannot be used \(not_utf8 2; a.txt: not_utf8: set read.encoding\); see .*quarantine",
        ),
        (
            report(unreadable_files=["a", "b"], file_problems={"a": "access was denied (403)"}),
            r"a among them; run again .* \(a: access was denied \(403\)\)$",
        ),
        (report(rows=0), "no training rows from 10 records .*check --input"),
        (report(rows=0, validation_rows=3), "all went to validation"),
    ],
)
def test_a_result_that_is_no_good_is_refused_and_its_input_listed_anew(tmp_path, total, message):
    job = job_of(tmp_path)
    with pytest.raises(UserError, match=message):
        check(job, total, is_first=True)
    assert read_plan(job.snapshot.plan_url) is None


def test_a_tokenizer_that_loses_text_is_refused_by_source():
    counts = {"documents": 30, "empty_documents": 2, "characters": 1000, "lost_characters": 51, "tokens": 200}
    found = Report("poems", tokenizer={**counts, "unknown_tokens": 60})
    with pytest.raises(
        UserError, match=r"5.1% of the sampled text of source poems \(60 of 200 tokens are unknown"
    ):
        check_tokenizer(found, 0.05)
    check_tokenizer(found, 0.051)
    check_tokenizer(Report(), 0.0)


def test_what_is_bearable_is_said(tmp_path, caplog):
    problem = "damaged_file: gzip data from byte 0 on: invalid code (of the records that were used, 58 at most may ...)"
    total = report(
        rejected={"invalid_json": 1},
        unreadable_files=["lost"],
        damaged_files=["torn", "worn"],
        file_problems={"torn": problem, "lost": "403", "odd": "trailing_garbage"},
    )
    check(job_of(tmp_path), total, is_first=True)
    used = "what could be read of it was used"
    assert [record.getMessage() for record in caplog.records] == [
        f"damaged, {used}: worn",
        f"{used}: torn: {problem}",
        f"{used}: odd: trailing_garbage",
        "could not be read (403) and is left out, a later run tries again: lost",
    ]
    check(job_of(tmp_path), report(rows=0), is_first=False)  # a later snapshot may add nothing


def test_the_terminal_names_each_kind_that_was_left_out_or_none():
    counts = {"rejected": {}, "filtered": {}, "unreadable_files": []}
    assert describe_left_out(counts) == "none"
    counts |= {"filtered": {"too_short": 1200, "duplicate": 3}, "unreadable_files": ["a", "b", "c", "d"]}
    assert (
        describe_left_out(counts)
        == "documents 1,203: too_short 1,200, duplicate 3; unreadable files 4: a, b, c"
    )
