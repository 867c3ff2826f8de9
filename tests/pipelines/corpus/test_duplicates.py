"""What is left to clean, and the keys of many units (the deduplication itself: tests/pipelines/test_prepare_corpus.py)."""

from dataclasses import replace

from llada.data.dedup.steps import DedupConfig
from llada.data.read.parts import InputFile, Part
from llada.data.work.config import PrepareConfig
from llada.data.work.job import Job, Removals, Snapshot
from llada.data.work.units import write_plan
from llada.files import write_bytes
from pipelines.corpus.duplicates import KeysUrls, left_to_clean
from pipelines.corpus.snapshots import Finished

CONFIG = PrepareConfig(dedup=DedupConfig())


def test_keys_are_named_when_they_are_asked_for(tmp_path):
    snapshot = Snapshot(str(tmp_path), 0)
    parts = (("", Part(InputFile(f"{n}.txt", f"{n}.txt", 10, "e"), 10)) for n in range(3))
    plan = write_plan(snapshot.plan_url, parts, 1)
    job = Job(CONFIG, snapshot, plan).packing("hash", Removals("id"))
    urls = KeysUrls(job, "documents")
    assert len(urls) == 3
    assert urls[1:] == [job.document_keys_url(plan.unit(1)), job.document_keys_url(plan.unit(2))]
    assert KeysUrls(job, "lines")[0] == job.line_keys_url(plan.unit(0))


def test_a_finished_snapshot_is_left_to_clean_until_that_is_noted(tmp_path):
    snapshot = Snapshot(str(tmp_path), 0)
    write_plan(snapshot.plan_url, [("", Part(InputFile("a.txt", "a.txt", 10, "e"), 10))], 1)
    counts = {"dedup_id": "id", "resources_hash": "r"}
    dataset = {"kind": "pretrain", "row_length": 8, "splits": {}, "tokenizer_hash": "t"}
    finished = Finished(snapshot, {"counts": counts, "dataset": dataset})
    (job,) = left_to_clean(CONFIG, [finished])
    assert (job.removals, job.resources_hash, job.tokenizer_hash) == (Removals("id"), "r", "t")
    assert left_to_clean(replace(CONFIG, keep_documents=True), [finished]) == []
    assert left_to_clean(replace(CONFIG, dedup=DedupConfig(exact=False, fuzzy=False)), [finished]) == []
    write_bytes(snapshot.cleaned_url, b"{}")
    assert left_to_clean(CONFIG, [finished]) == []
