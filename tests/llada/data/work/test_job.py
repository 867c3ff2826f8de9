"""Names and places: what they depend on, and that they are those of finished folders."""

import dataclasses

from llada.data.dedup.steps import DedupConfig
from llada.data.read.parts import InputFile, Part
from llada.data.work.config import PrepareConfig, SourceConfig
from llada.data.work.job import Job, PackJob, Removals, Snapshot
from llada.data.work.read_config import ReadConfig
from llada.data.work.units import Plan, Unit

UNIT = Unit((Part(InputFile("s3://b/web/a.jsonl", "web/a.jsonl", 10, "etag"), 10),), "web")


def job_of(resources_hash="", tokenizer_hash="hash", dedup_id="", **changes) -> PackJob:
    config = PrepareConfig(**{"row_length": 32, "train_tokenizer_vocab": 400} | changes)
    job = Job(config, Snapshot("s3://out", 3), Plan("plan", 1, 1, 10, "id"), resources_hash)
    return job.packing(tokenizer_hash, Removals(dedup_id))


def test_names_change_with_everything_that_changes_bytes():
    changes = (
        {"row_length": 64},
        {"read": ReadConfig(min_chars=2)},
        {"dedup": DedupConfig()},
        {"packing": "best_fit"},
        {"tokenizer_hash": "other"},
        {"dedup_id": "other"},
        {"resources_hash": "other"},
    )
    names = {job_of(**change).shards_name(UNIT) for change in ({}, *changes)}
    assert len(names) == 1 + len(changes)
    assert dataclasses.replace(UNIT, source="code").name() != UNIT.name()


def test_names_are_those_of_finished_folders():
    """The numbers are of folders that exist: other ones would be prepared anew."""
    source = SourceConfig("web", ("x",), 1.0, read=ReadConfig(filters=("web",)))
    settings = {"dedup": DedupConfig(lines=True), "sources": (source,)}
    job = job_of("r", "t", "d", **settings)
    assert job.documents_name(UNIT) == "a-ef7881bd3367"
    assert job.shards_name(UNIT) == "a-083b9eba2c09"
    given = job_of("r", "t", "d", tokenizer="x", **settings)
    assert given.shards_name(UNIT) == "a-c5e6130a5acf"


def test_everything_lies_below_the_output():
    job = job_of("r", "t", "d")
    name = job.shards_name(UNIT)
    assert job.packed_url(UNIT) == f"s3://out/units/{name}.json"
    assert job.keys_url("lines", UNIT) == f"s3://out/documents/{name}.lines.keys"
    assert job.keys_url("documents", UNIT) == f"s3://out/documents/{job.documents_name(UNIT)}.documents.keys"
    assert job.dedup_folder("lines") == "s3://out/snapshots/0003/dedup/lines-d"
    assert job.snapshot.group_url(7, "shards") == "s3://out/snapshots/0003/groups/000007.shards"
    assert job.snapshot.manifest_url == "s3://out/snapshots/0003/manifest.json"


def test_lists_of_earlier_snapshots_are_named_from_the_newest_on():
    snapshot = Snapshot("out", 3)
    assert snapshot.beside("train.parquet") == "../0003/train.parquet"
    assert snapshot.beside("../0001/train.parquet") == "../0001/train.parquet"
