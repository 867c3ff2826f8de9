"""llada/data/units.py and prepare.py: planning, processing and re-using work units (the stage around it: tests/pipelines)."""

import dataclasses
import gzip
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from llada.data.documents import Rejects, expand_inputs
from llada.data.prepare import (
    PrepareConfig,
    finished_report,
    load_unit_counts,
    process_unit,
    sample_unit,
)
from llada.data.units import plan_units
from llada.tokenizer import encode_texts, train_tokenizer

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


def run(config, path, tokenizer, output):
    units = plan_units(expand_inputs([str(path)]), config.unit_bytes)
    return [process_unit(unit, config, tokenizer, "hash", str(output)) for unit in units]


def stream(output, reports, split):
    """All tokens of a split in order, padding cut away."""
    pieces = []
    for shard in (s for r in reports for s in r.shards if s["split"] == split):
        stored = load_file(output / shard["name"])
        assert stored["tokens"].shape == (shard["rows"], 32)
        pieces.append(stored["tokens"].reshape(-1)[: shard["tokens"]])
    return np.concatenate(pieces).tolist()


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_document_lands_once_in_one_split(corpus, tokenizer, tmp_path):
    reports = run(config(), corpus, tokenizer, tmp_path / "out")
    (report,) = reports
    assert len([s for s in report.shards if s["split"] == "train"]) > 1  # rows_per_shard cuts
    found = []
    for split in ("train", "validation"):
        text = tokenizer.decode(stream(tmp_path / "out", reports, split))
        documents = text.split("<|endoftext|>")
        assert documents.pop() == ""  # every document is closed
        assert len(documents) == report.documents[split]
        found += documents
    assert sorted(found) == sorted(text.rstrip("\n") for text in TEXTS)
    assert 8 <= report.documents["validation"] <= 45


def test_the_split_depends_on_the_text_alone(corpus, tokenizer, tmp_path):
    first = run(config(), corpus, tokenizer, tmp_path / "a")
    other = tmp_path / "reversed.jsonl"
    other.write_text("\n".join(reversed(corpus.read_text().splitlines())))
    second = run(config(unit_bytes=3000), other, tokenizer, tmp_path / "b")
    for split in ("train", "validation"):
        a = tokenizer.decode(stream(tmp_path / "a", first, split)).split("<|endoftext|>")
        b = tokenizer.decode(stream(tmp_path / "b", second, split)).split("<|endoftext|>")
        assert sorted(a) == sorted(b)
    moved = run(config(split_seed=1), corpus, tokenizer, tmp_path / "c")
    assert moved[0].documents != first[0].documents or moved[0].shards != first[0].shards


def test_unigram_counts_are_those_of_the_train_tokens(corpus, tokenizer, tmp_path):
    reports = run(config(), corpus, tokenizer, tmp_path / "out")
    counts = load_unit_counts(str(tmp_path / "out"), reports[0].name, len(tokenizer))
    assert np.array_equal(
        counts, np.bincount(stream(tmp_path / "out", reports, "train"), minlength=len(tokenizer))
    )


def test_a_moved_corpus_gives_the_same_bytes(corpus, tokenizer, tmp_path):
    run(config(), corpus, tokenizer, tmp_path / "a")
    (tmp_path / "elsewhere").mkdir()
    moved = corpus.rename(tmp_path / "elsewhere" / corpus.name)
    run(config(), moved, tokenizer, tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_finished_unit_is_not_done_again(corpus, tokenizer, tmp_path):
    out, settings = tmp_path / "out", config()
    (report,) = run(settings, corpus, tokenizer, out)
    before = tree(out)
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert run(settings, corpus, tokenizer, out) == [report]
    assert stamps == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    for victim in (report.shards[0]["name"], f"units/{report.name}.json", f"units/{report.name}.unigrams"):
        (out / victim).unlink()
        (unit,) = plan_units(expand_inputs([str(corpus)]), settings.unit_bytes)
        assert finished_report(unit, settings, "hash", str(out)) is None
        run(settings, corpus, tokenizer, out)
        assert tree(out) == before
    corpus.write_bytes(
        corpus.read_bytes().replace(b"speaks", b"SPEAKS")
    )  # same name and size, another content
    (unit,) = plan_units(expand_inputs([str(corpus)]), settings.unit_bytes)
    assert finished_report(unit, settings, "hash", str(out)) is None


def test_names_change_with_everything_that_changes_bytes(corpus):
    (unit,) = plan_units(expand_inputs([str(corpus)]), config().unit_bytes)
    names = {
        unit.name(config(**c).content(), "h")
        for c in ({}, {"row_length": 64}, {"min_chars": 2}, {"kind": "sft"})
    }
    assert len(names | {unit.name(config().content(), "other tokenizer")}) == 5
    assert config(tokenizer="/x", max_invalid_fraction=1.0).content() == config().content()


def test_plan_cuts_large_files_and_groups_small_ones(tmp_path, corpus, tokenizer):
    for i in range(5):
        (tmp_path / f"small{i}.txt").write_text("x" * 400)
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "p.parquet", row_group_size=20, compression="none")
    settings = config(unit_bytes=2000)
    units = plan_units(expand_inputs([str(tmp_path)]), settings.unit_bytes)
    labels = [[p.label.rsplit("/", 1)[1] for p in unit.parts] for unit in units]
    assert ["small0.txt", "small1.txt", "small2.txt", "small3.txt", "small4.txt"] in labels
    assert ["corpus.jsonl#2000-4000"] in labels
    assert sum("p.parquet#" in label[0] for label in labels) > 1
    assert sum("z.jsonl.gz" in part for label in labels for part in label) == 1
    reports = [process_unit(unit, settings, tokenizer, "hash", str(tmp_path / "out")) for unit in units]
    assert sum(r.documents.get("read", 0) for r in reports) == 5 + 3 * len(TEXTS)


def test_filters_and_sections(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(TEXTS))
    (whole,) = run(config(max_chars=1000), path, tokenizer, tmp_path / "a")
    assert (whole.filtered, whole.shards) == ({"too_long": 1}, [])
    (cut,) = run(config(section_chars=500), path, tokenizer, tmp_path / "b")
    assert cut.documents["read"] > 30
    text = tokenizer.decode(
        stream(tmp_path / "b", [cut], "train") + stream(tmp_path / "b", [cut], "validation")
    )
    assert len(text.replace("<|endoftext|>", "").replace("\n", "")) == len(path.read_text().replace("\n", ""))


def test_rejects_are_reported_and_quarantined(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\nbroken\n{"text": null}\n')
    broken = tmp_path / "b.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"text": "fine"}\n' * 50)[:-9])
    (report,) = run(config(), tmp_path, tokenizer, tmp_path / "out")
    assert report.rejected == {"invalid_json": 1, "null_text": 1, "truncated_file": 1}
    assert report.damaged_files == [str(broken)]
    quarantined = [
        json.loads(x) for x in (tmp_path / f"out/quarantine/{report.name}.jsonl").read_text().splitlines()
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
    settings = config(kind="sft", row_length=96)
    (report,) = run(settings, path, tokenizer, tmp_path / "out")
    assert report.filtered == {"example_longer_than_row": 1}
    assert report.rejected == {"unknown_sft_format": 1}
    assert report.documents["train"] + report.documents["validation"] == report.documents["kept"] == 40
    assert sum(s["rows"] for s in report.shards) == 40
    train = [s for s in report.shards if s["split"] == "train"]
    assert [s["rows"] for s in train[:-1]] == [16] * (len(train) - 1)
    stored = load_file(tmp_path / "out" / train[0]["name"])
    _, start, end = stored["segments"][0]
    row = stored["tokens"][0].tolist()
    assert row[end - 2 : end] == [tokenizer.convert_tokens_to_ids("<|eot_id|>"), tokenizer.eos_token_id]
    assert set(row[end:]) == {tokenizer.pad_token_id}
    assert tokenizer.decode(row[start : end - 2]).startswith("It is ")
    counts = load_unit_counts(str(tmp_path / "out"), report.name, len(tokenizer))
    assert counts[tokenizer.eos_token_id] == sum(s["rows"] for s in train)


def test_sampling_takes_the_beginning_of_the_train_split(corpus):
    settings = config()
    (unit,) = plan_units(expand_inputs([str(corpus)]), settings.unit_bytes)
    everything = sample_unit(unit, settings, 10**9, Rejects(), Counter())
    some = sample_unit(unit, settings, 1000, Rejects(), Counter())
    assert len(everything) < len(TEXTS)  # without the validation documents
    assert some == everything[: len(some)]
    assert 1000 <= sum(map(len, some)) < 1500


def test_special_tokens_in_documents_stay_text(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a <|mdm_mask|> b"}))
    (report,) = run(config(validation_fraction=0.0), path, tokenizer, tmp_path / "out")
    tokens = stream(tmp_path / "out", [report], "train")
    assert tokens == [*encode_texts(tokenizer, ["a <|mdm_mask|> b"])[0], 0]
    assert tokenizer.mask_token_id not in tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_length": 0}, "row_length must be at least 8 tokens"),
        ({"row_length": 1 << 30}, "row_length must be at most"),
        ({"kind": "other"}, "kind must be pretrain or sft"),
        ({"validation_fraction": 1.0}, r"validation_fraction must lie in \[0, 1\)"),
        ({"train_tokenizer_vocab": None}, "give either tokenizer or train_tokenizer_vocab"),
        ({"tokenizer": "x"}, "give either tokenizer or train_tokenizer_vocab"),
        ({"max_chars": 5, "min_chars": 6}, "max_chars must be at least min_chars"),
    ],
)
def test_senseless_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config(), **changes).validate()
