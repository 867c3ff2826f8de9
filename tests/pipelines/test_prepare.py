import dataclasses
import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llada.data.prepare import pack_unit, sample_unit
from llada.data.read.listing import list_inputs
from llada.data.tokens.shards import TokenDataset, load_unigram_counts
from llada.data.work.config import PrepareConfig
from llada.data.work.job import Job, Snapshot
from llada.data.work.read_config import ReadConfig
from llada.data.work.units import cut_file, write_plan
from llada.errors import UserError
from llada.files import filesystem
from llada.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from pipelines.prepare import describe_check, prepare
from pipelines.stage.artifact import open_output, read_manifest
from pipelines.stage.cluster import ClusterConfig
from pipelines.stage.tracking import default_tracking_uri, tracked

pytestmark = pytest.mark.integration
CONFIG = PrepareConfig(
    row_length=32, train_tokenizer_vocab=400, validation_fraction=0.2, unit_bytes=1500, rows_per_shard=20
)
TEXTS = [f"Document number {i} speaks of {i * i} things.\n" * (1 + i % 5) for i in range(60)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "a.jsonl").write_text("".join(lines[:30]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[30:]).encode(), mtime=0))
    return folder


def run(config, inputs, output, workers=None, **options):
    cluster = ClusterConfig(data_workers=workers)
    return prepare(
        config, inputs=[str(inputs)], output=str(output), cluster=cluster, progress=False, **options
    )


def content(folder: Path) -> dict[str, bytes]:
    """All that training reads: shards, their lists, unigram counts, tokenizers."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    places = ("train/", "validation/", "tokenizer/", "snapshots/")
    kinds = (".safetensors", ".parquet", ".npy", "tokenizer.json", "tokenizer_config.json")
    return {
        n: p.read_bytes()
        for n, p in files.items()
        if n.startswith(places) and n.endswith(kinds) and "/dedup/" not in n
    }


@pytest.fixture(scope="module")
def prepared(local_ray, corpus, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "out"
    run(CONFIG, corpus, output, workers=1)
    return output


def test_the_folder_is_complete_and_readable(prepared, corpus, verify_shards):
    manifest = read_manifest(str(prepared))
    counts = manifest["counts"]
    assert counts["units"] >= 3
    assert counts["documents_kept"] == len(TEXTS)
    assert counts["records_rejected"] == 0
    tokenizer = load_tokenizer(prepared / "tokenizer")
    dataset = manifest["dataset"]
    assert (dataset["vocab_size"], dataset["mask_token_id"], dataset["eos_token_id"]) == (
        len(tokenizer),
        1,
        0,
    )
    found = []
    for split in ("train", "validation"):
        verify_shards(str(prepared), split)
        data = TokenDataset(str(prepared), split)
        assert len(data) == counts[f"{split}_rows"] > 0
        rows = data.rows(np.arange(len(data)))
        assert rows.lengths.sum() == counts[f"{split}_tokens"]
        text = tokenizer.decode(rows.tokens[rows.segment_ids >= 0])
        found += text.split("<|endoftext|>")[:-1]
        if split == "train":
            unigrams = load_unigram_counts(str(prepared))
            assert np.array_equal(unigrams, np.bincount(rows.tokens[rows.maskable], minlength=len(tokenizer)))
            shares = unigrams[unigrams > 0] / unigrams.sum()
            assert math.isclose(counts["unigram_entropy"], -(shares * np.log(shares)).sum())
    assert sorted(found) == sorted(text.rstrip("\n") for text in TEXTS)


def test_two_workers_make_the_same_bytes(prepared, corpus, tmp_path):
    run(CONFIG, corpus, tmp_path / "out", workers=2)
    assert content(tmp_path / "out") == content(prepared)


def test_plain_python_makes_the_same_bytes(prepared, corpus, tmp_path):
    found = [("", p) for file in list_inputs([str(corpus)]) for p in cut_file(file, CONFIG.unit_bytes)]
    plan = write_plan(str(tmp_path / "plan"), found, CONFIG.unit_bytes)
    digest = read_manifest(str(prepared))["dataset"]["tokenizer_hash"]
    job = Job(CONFIG, Snapshot(str(tmp_path), 0), plan).packing(digest)
    texts = [text for index in range(plan.units) for text in sample_unit(job, index, 10**9)["texts"]]
    save_tokenizer(train_tokenizer(texts, 400), tmp_path / "tokenizer")
    for index in reversed(range(plan.units)):
        pack_unit(job, index)
    expected = {name: data for name, data in content(prepared).items() if not name.startswith("snapshots/")}
    assert content(tmp_path) == expected


def test_a_finished_folder_is_returned_untouched(prepared, corpus):
    before = {p: p.stat().st_mtime_ns for p in prepared.rglob("*")}
    assert run(CONFIG, corpus, prepared) == read_manifest(str(prepared))
    assert before == {p: p.stat().st_mtime_ns for p in prepared.rglob("*")}


def test_an_interrupted_run_is_finished_as_if_undisturbed(prepared, corpus, tmp_path):
    expected = content(prepared)
    output = tmp_path / "out"
    first = run(CONFIG, corpus, output)
    names = sorted(path.stem for path in (output / "units").glob("*.json"))
    (output / "manifest.json").unlink()
    (output / "snapshots/0000/manifest.json").unlink()
    (output / f"units/{names[0]}.json").unlink()  # a unit that did not come to its report
    for shard in output.glob(f"train/{names[1]}*"):  # a unit that lost its shards
        shard.unlink()
    kept = output / f"units/{names[2]}.json"
    stamp = kept.stat().st_mtime_ns
    again = run(CONFIG, corpus, output)
    assert content(output) == expected
    assert kept.stat().st_mtime_ns == stamp
    assert again["files"] == first["files"]


def test_relative_paths_mean_this_directory(local_ray, prepared, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(corpus.parent)
    run(CONFIG, corpus.name, "relative-out")
    assert content(corpus.parent / "relative-out") == content(prepared)


def test_another_configuration_needs_another_folder(prepared, corpus):
    with pytest.raises(UserError, match=r"row_length 32 \(now 64\); choose another --output"):
        run(dataclasses.replace(CONFIG, row_length=64), corpus, prepared)


def test_s3(local_ray, s3_url, corpus, prepared, tmp_path, monkeypatch, verify_shards):
    monkeypatch.setenv("LLADA_CACHE", str(tmp_path))
    fs, root = filesystem(f"{s3_url}/{corpus.name}")
    for path in corpus.iterdir():
        fs.put_file(str(path), f"{root}/{path.name}")
    output = f"{s3_url}/prepared"
    run(CONFIG, f"{s3_url}/{corpus.name}", output)
    local, remote = TokenDataset(str(prepared)), TokenDataset(output)
    assert remote.fingerprint == local.fingerprint
    indices = np.random.default_rng(0).permutation(len(local))
    for field in ("tokens", "segment_ids", "maskable", "lengths"):
        assert np.array_equal(getattr(remote.rows(indices), field), getattr(local.rows(indices), field))
    verify_shards(output, "validation")
    assert np.array_equal(load_unigram_counts(output), load_unigram_counts(str(prepared)))
    assert run(CONFIG, f"{s3_url}/{corpus.name}", output) == read_manifest(output)


@pytest.mark.parametrize("kind", ["sft", "unified"])
def test_sft_with_the_tokenizer_of_a_prepared_folder(prepared, tmp_path, kind):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"{i}?", "answer": f"It is {i}."}) + "\n" for i in range(20))
    )
    config = PrepareConfig(
        kind=kind, row_length=96, tokenizer=str(prepared / "tokenizer"), validation_fraction=0.3
    )
    manifest = run(config, path, tmp_path / "out")
    counts, data = manifest["counts"], TokenDataset(str(tmp_path / "out"))
    assert data.kind == kind
    if kind == "unified":  # several to a row, and all of them is learned
        rows = data.rows(np.arange(len(data)))
        assert rows.segment_ids.max() > 0
        assert rows.maskable.sum() == counts["train_tokens"] == load_unigram_counts(data.url).sum()
        return
    assert counts["train_rows"] + counts["validation_rows"] == 20
    rows = data.rows(np.arange(len(data)), pad_to=int(data.lengths(np.arange(len(data))).max()))
    assert rows.maskable[:, -1].all()
    assert not rows.maskable[:, 0].any()


def test_tracking(local_ray, corpus, tmp_path, tracking_uri):
    output = str(tmp_path / "out")
    with tracked("prepare", output) as tracker:
        manifest = run(CONFIG, corpus, output, tracker=tracker)
    client = MlflowClient(default_tracking_uri(output))
    mlrun = client.get_run(manifest["mlflow_run_id"])
    assert mlrun.data.params["row_length"] == "32"
    assert mlrun.data.metrics["train_rows"] == manifest["counts"]["train_rows"]
    assert mlrun.inputs.dataset_inputs[0].dataset.name.endswith(corpus.name)


def test_too_much_rubbish(local_ray, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + "rubbish\n" * 20)
    with pytest.raises(
        UserError, match=r"20 of 80 records cannot be used \(invalid_json 20\); see .*quarantine"
    ):
        run(CONFIG, path, tmp_path / "out")
    assert run(dataclasses.replace(CONFIG, max_invalid_fraction=0.5), path, tmp_path / "out")


def test_nothing_left(local_ray, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one short text")
    with pytest.raises(UserError, match=r"no usable document in the train split \(left out: too_short 1\)"):
        run(dataclasses.replace(CONFIG, read=ReadConfig(min_chars=100)), path, tmp_path / "a")
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path / "tokenizer")
    given = dataclasses.replace(CONFIG, tokenizer=str(tmp_path / "tokenizer"), train_tokenizer_vocab=None)
    with pytest.raises(UserError, match=r"no training rows from 1 records \(left out: too_short 1\)"):
        run(dataclasses.replace(given, read=ReadConfig(min_chars=100)), path, tmp_path / "b")
    with pytest.raises(UserError, match="all went to validation: set read.section_chars"):
        run(dataclasses.replace(given, validation_fraction=0.999), path, tmp_path / "c")


def test_a_tokenizer_that_does_not_know_the_text(local_ray, tmp_path):
    words = ["the", "cat", "sat", "[UNK]"]
    model = models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    save_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), tmp_path / "tokenizer")
    config = dataclasses.replace(
        CONFIG, tokenizer=str(tmp_path / "tokenizer"), train_tokenizer_vocab=None, validation_fraction=0.0
    )
    path = tmp_path / "a.txt"
    path.write_text("\n".join(["床前明月光疑是地上霜"] * 30))
    with pytest.raises(UserError, match=r"the tokenizer loses 100\.0% of the sampled text .*knows this text"):
        run(config, path, tmp_path / "a")
    with pytest.raises(UserError, match=r"no training rows from 1 records \(left out: not_in_vocabulary 1\)"):
        run(dataclasses.replace(config, max_lost_text_fraction=1.0), path, tmp_path / "b")
    path.write_text("the cat sat " * 30)
    counts = run(config, path, tmp_path / "c")["counts"]
    assert counts["tokenizer_check"][""]["documents"] == 1
    assert describe_check("", counts["tokenizer_check"][""]).startswith(
        "tokenizer check: 1 documents, 0.00% of their characters lost, 0.00% of the tokens unknown, 0 empty, 0 do"
    )


@pytest.mark.parametrize(
    ("changes", "inputs", "message"),
    [
        ({}, "none.jsonl", r"no input at .*none\.jsonl"),
        ({"train_tokenizer_vocab": None}, "", "give a tokenizer's folder"),
        (
            {"tokenizer": "/nowhere", "train_tokenizer_vocab": None},
            "a.jsonl",
            r"no tokenizer\.json in /nowhere",
        ),
    ],
)
def test_mistakes_are_found_before_ray_starts(corpus, tmp_path, changes, inputs, message):
    with pytest.raises(UserError, match=message):
        run(dataclasses.replace(CONFIG, **changes), corpus / inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failing_task_is_one_clear_error(local_ray, corpus, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    open_output(str(output), stage="prepare", config=CONFIG.content(), inputs=[])
    (output / "train").write_text("a file where a folder must be")
    with pytest.raises(UserError, match="train"):
        run(CONFIG, corpus, output)


def test_a_process_of_its_own_is_quiet(corpus, tmp_path):
    """From start to end with its own Ray: the progress line alone is on the terminal, the rest is in logs/."""
    program = (
        "import sys; from pipelines.prepare import *\n"
        "c = PrepareConfig(row_length=32, train_tokenizer_vocab=400)\n"
        "prepare(c, inputs=[sys.argv[1]], output=sys.argv[2], cluster=ClusterConfig(num_cpus=1))\n"
    )
    command = [sys.executable, "-c", program, str(corpus), str(tmp_path / "out")]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    shown = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    steps = ("sample:", "pack:", "merge:", "training a tokenizer")
    assert all(line.startswith(steps) for line in shown), done.stderr
    assert "Execution plan" in (tmp_path / "out/logs/ray.log").read_text()
