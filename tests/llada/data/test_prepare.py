"""The way of documents through work units: processing and re-using them (the stage around it: tests/pipelines)."""

import dataclasses
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from llada.data.prepare import pack_unit, sample_unit
from llada.data.read.listing import list_inputs
from llada.data.work.config import PrepareConfig, SourceConfig
from llada.data.work.job import Job, PackJob, Snapshot
from llada.data.work.read_config import ReadConfig
from llada.data.work.tasks import finished_unit, group_reports, group_shards, group_unigrams, merge_group
from llada.data.work.units import cut_file, write_plan
from llada.tokenizer import encode_texts, save_tokenizer, train_tokenizer

TEXTS = [f"Document number {i} speaks of {i * i} things.\n" * (1 + i % 7) for i in range(120)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def config(**changes) -> PrepareConfig:
    defaults = {
        "row_length": 32,
        "train_tokenizer_vocab": 400,
        "validation_fraction": 0.2,
        "rows_per_shard": 16,
    }
    return PrepareConfig(**defaults | changes)


def parts(unit_bytes, *inputs):
    return (
        ("", part) for file in list_inputs([str(i) for i in inputs]) for part in cut_file(file, unit_bytes)
    )


def job_of(config, path, tokenizer, output) -> PackJob:
    save_tokenizer(tokenizer, output / "tokenizer")
    snapshot = Snapshot(str(output), 0)
    plan = write_plan(snapshot.plan_url, parts(config.unit_bytes, path), config.unit_bytes)
    return Job(config, snapshot, plan).packing("hash")


def units_of(job):
    return [job.plan.unit(index) for index in range(job.plan.units)]


def run(config, path, tokenizer, output):
    """What every unit left behind, in order."""
    job = job_of(config, path, tokenizer, output)
    for index in range(job.plan.units):
        pack_unit(job, index)
    return [finished_unit(job, unit) for unit in units_of(job)]


def stream(output, found, split):
    """All tokens of a split in order, padding cut away."""
    pieces = [np.empty(0, np.uint32)]
    for shard in (s for f in found for s in f.shards if s.split == split):
        stored = load_file(output / shard.name)
        assert stored["tokens"].shape == (shard.rows, 32)
        pieces.append(stored["tokens"].reshape(-1)[: shard.tokens])
    return np.concatenate(pieces).tolist()


def shards(folder):
    """What training reads: names and bytes."""
    found = [p for split in ("train", "validation") for p in (folder / split).glob("*")]
    return {p.name: p.read_bytes() for p in found}


def test_every_document_lands_once_in_one_split(corpus, tokenizer, tmp_path):
    found = run(config(), corpus, tokenizer, tmp_path / "out")
    (unit,) = found
    assert len([s for s in unit.shards if s.split == "train"]) > 1  # rows_per_shard cuts
    texts = []
    for split in ("train", "validation"):
        text = tokenizer.decode(stream(tmp_path / "out", found, split))
        documents = text.split("<|endoftext|>")
        assert documents.pop() == ""  # every document is closed
        assert len(documents) == unit.report.splits[split]["documents"]
        texts += documents
    assert sorted(texts) == sorted(text.rstrip("\n") for text in TEXTS)
    assert 8 <= unit.report.splits["validation"]["documents"] <= 45
    assert unit.report.documents() == unit.report.documents("kept") == len(TEXTS)


def test_the_split_depends_on_the_text_alone(corpus, tokenizer, tmp_path):
    first = run(config(), corpus, tokenizer, tmp_path / "a")
    other = tmp_path / "reversed.jsonl"
    other.write_text("\n".join(reversed(corpus.read_text().splitlines())))
    second = run(config(unit_bytes=3000), other, tokenizer, tmp_path / "b")
    assert len(second) > 1
    for split in ("train", "validation"):
        a = tokenizer.decode(stream(tmp_path / "a", first, split)).split("<|endoftext|>")
        b = tokenizer.decode(stream(tmp_path / "b", second, split)).split("<|endoftext|>")
        assert sorted(a) == sorted(b)
    moved = run(config(split_seed=1), corpus, tokenizer, tmp_path / "c")
    assert moved[0].shards != first[0].shards


def test_a_moved_corpus_gives_the_same_bytes(corpus, tokenizer, tmp_path):
    run(config(), corpus, tokenizer, tmp_path / "a")
    (tmp_path / "elsewhere").mkdir()
    moved = corpus.rename(tmp_path / "elsewhere" / corpus.name)
    run(config(), moved, tokenizer, tmp_path / "b")
    assert shards(tmp_path / "a") == shards(tmp_path / "b") != {}


def test_a_finished_unit_is_not_done_again(corpus, tokenizer, tmp_path):
    out, settings = tmp_path / "out", config()
    (found,) = run(settings, corpus, tokenizer, out)
    before = shards(out)
    stamps = {p: p.stat().st_mtime_ns for folder in ("train", "units") for p in (out / folder).iterdir()}
    job = job_of(settings, corpus, tokenizer, out)
    pack_unit(job, 0)
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    for victim in (
        found.shards[0].name,
        f"units/{found.name}.json",
        f"units/{found.name}.unigrams",
    ):
        (out / victim).unlink()
        assert finished_unit(job, job.plan.unit(0)) is None
        pack_unit(job, 0)
        assert shards(out) == before
        assert (out / victim).exists()
    changed = corpus.read_bytes().replace(b"speaks", b"SPEAKS")  # same name and size, another content
    corpus.write_bytes(changed)
    (out / "snapshots/0000/plan/plan.json").unlink()
    other = job_of(settings, corpus, tokenizer, tmp_path / "again")
    assert finished_unit(dataclasses.replace(other, snapshot=job.snapshot), other.plan.unit(0)) is None


def test_a_plan_cuts_large_files_and_groups_small_ones(tmp_path, corpus, tokenizer):
    for i in range(5):
        (tmp_path / f"small{i}.txt").write_text("x" * 400)
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "p.parquet", row_group_size=20, compression="none")
    settings = config(unit_bytes=2000)
    job = job_of(settings, tmp_path / "*.*", tokenizer, tmp_path / "out")
    labels = [[p.label.rsplit("/", 1)[1] for p in unit.parts] for unit in units_of(job)]
    assert any(sum(name.startswith("small") for name in label) >= 3 for label in labels)
    assert ["corpus.jsonl#2000-4000"] in labels
    assert sum("p.parquet#" in label[0] for label in labels) > 1
    assert sum("z.jsonl.gz" in part for label in labels for part in label) == 1
    assert job.plan.files == 8
    for index in range(job.plan.units):
        pack_unit(job, index)
    found = [finished_unit(job, unit).report for unit in units_of(job)]
    assert sum(report.documents() for report in found) == 5 + 3 * len(TEXTS)


def test_groups_add_up(corpus, tokenizer, tmp_path):
    found = run(config(unit_bytes=3000), corpus, tokenizer, tmp_path / "out")
    job = job_of(config(unit_bytes=3000), corpus, tokenizer, tmp_path / "out")
    assert merge_group(job, 0) == len(found) > 3
    (report,) = group_reports(job, 0)
    assert report.units == len(found)
    assert report.documents("kept") == len(TEXTS)
    assert sum(report.histograms["characters"].values()) == len(TEXTS)
    listed = group_shards(job, 0)
    assert [shard.name for shard in listed] == [s.name for f in found for s in f.shards]
    train = stream(tmp_path / "out", found, "train")
    assert np.array_equal(
        group_unigrams(job, 0, len(tokenizer)), np.bincount(train, minlength=len(tokenizer))
    )
    assert report.splits["train"]["tokens"] == len(train)


def test_lengths_and_sections(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(TEXTS))
    (whole,) = run(config(read=ReadConfig(max_chars=1000)), path, tokenizer, tmp_path / "a")
    assert whole.report.refused() == {"too_long": 1}
    assert whole.shards == []
    found = run(config(read=ReadConfig(section_chars=500)), path, tokenizer, tmp_path / "b")
    assert found[0].report.documents() > 30
    text = tokenizer.decode(
        stream(tmp_path / "b", found, "train") + stream(tmp_path / "b", found, "validation")
    )
    assert len(text.replace("<|endoftext|>", "").replace("\n", "")) == len(path.read_text().replace("\n", ""))


def test_best_fit_cuts_only_what_is_longer_than_a_row(corpus, tokenizer, tmp_path):
    found = run(config(packing="best_fit"), corpus, tokenizer, tmp_path / "out")
    lengths = [len(ids) + 1 for ids in encode_texts(tokenizer, [t.rstrip("\n") for t in TEXTS])]
    segments = sum(shard.segments for shard in found[0].shards)
    assert segments == sum(-(-length // 32) for length in lengths)
    assert sum(shard.tokens for shard in found[0].shards) == sum(lengths)


def test_each_source_is_read_its_own_way(tmp_path, tokenizer):
    sources = (
        SourceConfig("a", (), read=ReadConfig(min_chars=60)),
        SourceConfig("b", (), read=ReadConfig(text_field="body")),
    )
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in TEXTS))
    job = job_of(config(sources=sources), tmp_path / "*.jsonl", tokenizer, tmp_path / "out")
    named = [
        (file.name.rpartition("/")[2][0], part)
        for file in list_inputs([f"{tmp_path}/*.jsonl"])
        for part in cut_file(file, 10**6)
    ]
    job = dataclasses.replace(job, plan=write_plan(str(tmp_path / "plan"), named, 10**6))
    assert [unit.source for unit in units_of(job)] == ["a", "b"]
    for index in range(2):
        pack_unit(job, index)
    a, b = (finished_unit(job, unit).report for unit in units_of(job))
    assert (
        a.documents("kept")
        == sum(len(t.rstrip("\n")) >= 60 for t in TEXTS)
        < b.documents("kept")
        == len(TEXTS)
    )


def test_rejects_are_reported_and_quarantined(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\nbroken\n{"text": null}\n')
    broken = tmp_path / "b.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"text": "fine"}\n' * 50)[:-9])
    (found,) = run(config(), tmp_path / "*.jsonl*", tokenizer, tmp_path / "out")
    assert found.report.rejected == {"invalid_json": 1, "null_text": 1, "truncated_file": 1}
    assert found.report.damaged_files == [str(broken)]
    quarantined = [
        json.loads(x) for x in (tmp_path / f"out/quarantine/{found.name}.jsonl").read_text().splitlines()
    ]
    assert [(q["reason"], q["line"], q["text"]) for q in quarantined[:2]] == [
        ("invalid_json", 2, "broken"),
        ("null_text", 3, '{"text": null}'),
    ]


def test_sft_units(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    records = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(40)]
    records += [{"prompt": "long", "response": "y" * 3000}, {"prompt": "no answer"}]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    (found,) = run(config(kind="sft", row_length=96), path, tokenizer, tmp_path / "out")
    report = found.report
    assert report.refused() == {"example_longer_than_row": 1}
    assert report.rejected == {"unknown_sft_format": 1}
    assert (
        sum(report.splits[s]["documents"] for s in ("train", "validation")) == report.documents("kept") == 40
    )
    assert sum(s.rows for s in found.shards) == 40
    train = [s for s in found.shards if s.split == "train"]
    assert [s.rows for s in train[:-1]] == [16] * (len(train) - 1)
    stored = load_file(tmp_path / "out" / train[0].name)
    _, start, end = stored["segments"][0]
    row = stored["tokens"][0].tolist()
    assert row[end - 2 : end] == [tokenizer.convert_tokens_to_ids("<|eot_id|>"), tokenizer.eos_token_id]
    assert set(row[end:]) == {tokenizer.pad_token_id}
    assert tokenizer.decode(row[start : end - 2]).startswith("It is ")


@pytest.mark.parametrize(
    ("too_long", "rows", "edits"),
    [
        ("drop", 1, {"examples_longer_than_row": 2}),
        ("truncate_prompt", 2, {"examples_longer_than_row": 1, "truncated_prompts": 1}),
    ],
)
def test_turns_that_do_not_fit_are_counted(tmp_path, tokenizer, too_long, rows, edits):
    turns = ["Hi.", "Hello.", "Tell me " + "more " * 40, "No.", "Why?", "Because. " * 40]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    settings = config(kind="sft", row_length=96, too_long=too_long, validation_fraction=0.0)
    (found,) = run(settings, tmp_path / "a.jsonl", tokenizer, tmp_path / "out")
    assert found.report.edits == edits
    assert found.report.documents("kept") == 1
    assert sum(shard.rows for shard in found.shards) == rows


def test_sampling_takes_the_beginning_of_the_train_split(corpus, tokenizer, tmp_path):
    job = job_of(config(), corpus, tokenizer, tmp_path / "out")
    everything, some = (sample_unit(job, 0, budget)["texts"] for budget in (10**9, 1000))
    assert len(everything) < len(TEXTS)  # without the validation documents
    assert some == everything[: len(some)]
    assert 1000 <= sum(map(len, some)) < 1500


def test_special_tokens_in_documents_stay_text(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a <|mdm_mask|> b"}))
    found = run(config(validation_fraction=0.0), path, tokenizer, tmp_path / "out")
    tokens = stream(tmp_path / "out", found, "train")
    assert tokens == [*encode_texts(tokenizer, ["a <|mdm_mask|> b"])[0], 0]
    assert tokenizer.mask_token_id not in tokens
