"""When a result is no good, and how the sums of snapshots are put together; without a cluster."""

import pytest

from llada.data.outcomes import Report
from llada.data.work.config import PrepareConfig
from llada.data.work.job import Job, Snapshot
from llada.data.work.units import Plan, read_plan
from llada.errors import UserError
from llada.files import write_bytes
from pipelines.corpus.finish import check


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


def test_what_is_bearable_is_said(tmp_path, caplog):
    total = report(rejected={"invalid_json": 1}, unreadable_files=["lost"], damaged_files=["torn"])
    check(job_of(tmp_path), total, is_first=True)
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["torn", "lost"]
    check(job_of(tmp_path), report(rows=0), is_first=False)  # a later snapshot may add nothing
