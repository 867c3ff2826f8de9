"""prepare as a scheduled job over a corpus: snapshots, deduplication, mixtures, crashes, files that cannot be read."""

from __future__ import annotations

import contextlib
import json
import random
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from llada.data.dedup.decontaminate import DecontaminationConfig
from llada.data.dedup.steps import DedupConfig
from llada.data.read.listing import list_inputs
from llada.data.tokens.manifest import resolve_snapshot
from llada.data.tokens.shards import TokenDataset, load_unigram_counts
from llada.data.work.config import PrepareConfig, SourceConfig
from llada.data.work.job import Snapshot
from llada.data.work.read_config import ReadConfig
from llada.data.work.units import cut_file, write_plan
from llada.errors import UserError
from llada.presets import tiny
from llada.settings import to_json
from llada.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from pipelines.corpus.inputs import settle_resources
from pipelines.corpus.tokenizer import given_tokenizer
from pipelines.prepare import prepare
from pipelines.stage.artifact import config_hash, open_output, read_manifest
from pipelines.stage.cluster import ClusterConfig

pytestmark = pytest.mark.integration
LONGER = [pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3, 4)]
REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = [
    f"{a}{b}"
    for a in ("ba", "de", "ki", "lo", "mu", "na", "po", "ra")
    for b in ("lt", "mon", "ry", "sk", "ven")
]


def sentence(seed: int, length: int = 60) -> str:
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(length))


def near(text: str) -> str:
    """A text with one word changed in the middle: Jaccard similarity 0.85 of its 5-grams."""
    words = text.split()
    words[30] = "changed"
    return " ".join(words)


def write(path: Path, texts: list[str], **fields: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, **fields}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer([sentence(i) for i in range(50)], 320), folder)
    return str(folder)


@pytest.fixture
def config(tokenizer) -> PrepareConfig:
    return PrepareConfig(
        row_length=64,
        tokenizer=tokenizer,
        validation_fraction=0.1,
        dedup=DedupConfig(bands=40, rows=4),  # finds all of `near`: 1 - (1 - 0.85^4)^40
        unit_bytes=4000,
        rows_per_shard=50,
    )


def run(config: PrepareConfig, inputs: Path | None, output: Path, **options) -> dict:
    given = [] if inputs is None else [str(inputs)]
    return prepare(
        config, inputs=given, output=str(output), cluster=ClusterConfig(), progress=False, **options
    )


def documents(url: str | Path) -> list[str]:
    """The texts of all splits, sorted."""
    found = []
    for split in ("train", "validation"):
        data = TokenDataset(str(url), split)
        rows = data.rows(np.arange(len(data)))
        text = load_tokenizer(Path(data.url) / "tokenizer").decode(rows.tokens[rows.segment_ids >= 0])
        found += text.split("<|endoftext|>")[:-1]
    return sorted(found)


def content(folder: Path) -> dict[str, bytes]:
    """All that training reads."""
    kinds = (".safetensors", ".parquet", ".npy", "tokenizer.json")
    return {
        name: path.read_bytes()
        for path in folder.rglob("*")
        if (name := str(path.relative_to(folder))).endswith(kinds) and "/dedup/" not in name
    }


def test_a_corpus_that_grows_gets_the_next_snapshot(local_ray, config, tmp_path, verify_shards):
    texts = [sentence(i) for i in range(40)]
    write(tmp_path / "corpus/2024/a.jsonl", [*texts[:20], texts[3], near(texts[4])])
    first = run(config, tmp_path / "corpus", tmp_path / "out")
    assert first["counts"]["filtered"] == {"duplicate": 2}
    assert (first["counts"]["duplicate_clusters"], first["counts"]["largest_duplicate_cluster"]) == (2, 2)
    page = (tmp_path / "out/snapshots/0000/report.html").read_text()
    assert "4 documents stand in 2 clusters" in page
    assert "<mark>changed</mark>" in page
    assert documents(tmp_path / "out") == sorted(texts[:20])
    before = documents(tmp_path / "out/snapshots/0000")

    write(tmp_path / "corpus/2025/b.jsonl", [texts[5], near(texts[6]), *texts[20:], near(texts[30])])
    second = run(config, tmp_path / "corpus", tmp_path / "out")
    assert second["snapshot"] == "snapshots/0001"
    assert second["counts"]["files"] == 1  # only what is new
    assert second["counts"]["filtered"] == {"duplicate": 1, "duplicate_of_earlier_snapshot": 2}
    assert documents(tmp_path / "out") == sorted(texts)
    assert documents(tmp_path / "out/snapshots/0000") == before  # still readable
    assert resolve_snapshot(str(tmp_path / "out")) == str(tmp_path / "out/snapshots/0001")
    for split in ("train", "validation"):
        verify_shards(str(tmp_path / "out"), split)
    data = TokenDataset(str(tmp_path / "out"))
    rows = data.rows(np.arange(len(data)))
    counts = load_unigram_counts(str(tmp_path / "out"))
    assert np.array_equal(counts, np.bincount(rows.tokens[rows.maskable], minlength=len(counts)))

    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    assert run(config, tmp_path / "corpus", tmp_path / "out") == second  # nothing new, nothing done
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    together = run(config, tmp_path / "corpus", tmp_path / "at-once")
    assert together["counts"]["filtered"] == {"duplicate": 5}
    assert documents(tmp_path / "at-once") == documents(tmp_path / "out")


def test_a_changed_file_needs_deduplication(local_ray, config, tmp_path):
    write(tmp_path / "a.jsonl", [sentence(i) for i in range(10)])
    plain = replace(config, dedup=DedupConfig(exact=False, fuzzy=False))
    for settings, output in ((plain, "plain"), (config, "deduplicated")):
        run(settings, tmp_path / "a.jsonl", tmp_path / output)
    write(tmp_path / "a.jsonl", [sentence(i) for i in range(12)])
    with pytest.raises(UserError, match=r"a\.jsonl has changed since it was prepared.*dedup\.exact"):
        run(plain, tmp_path / "a.jsonl", tmp_path / "plain")
    grown = run(config, tmp_path / "a.jsonl", tmp_path / "deduplicated")
    assert grown["counts"]["filtered"] == {"duplicate_of_earlier_snapshot": 10}
    assert documents(tmp_path / "deduplicated") == sorted(sentence(i) for i in range(12))


def test_lines_that_stood_before_are_removed(local_ray, config, tmp_path):
    banner = "this line stands at the top of every page of the site and says nothing about any of them at all"
    texts = [f"{sentence(i)}\n{banner}\n{sentence(100 + i)}" for i in range(12)]
    write(tmp_path / "a.jsonl", texts)
    lines = replace(config, dedup=DedupConfig(lines=True, min_line_chars=50))
    manifest = run(lines, tmp_path / "a.jsonl", tmp_path / "out")
    assert manifest["counts"]["edits"] == {"duplicate_lines": 11}
    assert documents(tmp_path / "out") == sorted(
        [texts[0], *(t.replace(f"{banner}\n", "") for t in texts[1:])]
    )


def test_filters_decontamination_and_the_report(local_ray, config, tmp_path):
    good = [
        f"The {sentence(i, 30)} and that is what they have to be with the rest. " * 3
        + f"\nIt ends with number {i}."
        for i in range(6)
    ]
    write(tmp_path / "eval.jsonl", [sentence(500, 20)])
    write(
        tmp_path / "a.jsonl",
        [*[sentence(i) for i in range(8)], "too short", f"A {sentence(500, 20)} copied."],
    )
    settings = replace(
        config,
        read=ReadConfig(filters=("gopher_quality", "pii")),
        decontamination=DecontaminationConfig(files=(str(tmp_path / "eval.jsonl"),)),
    )
    with pytest.raises(UserError, match=r"no training rows from 10 records \(left out: gopher_quality"):
        run(settings, tmp_path / "a.jsonl", tmp_path / "nothing")
    write(
        tmp_path / "b.jsonl",
        [
            *good,
            f"{good[0]} {sentence(500, 20)}",
            "Ask ann@site.org.",
            f"{good[1]} Mail to <script>joe@site.org.",
        ],
    )
    manifest = run(settings, tmp_path / "b.jsonl", tmp_path / "out")
    counts = manifest["counts"]
    assert counts["filtered"]["contaminated"] == 1
    assert counts["edits"] == {"email": 1}
    page = (tmp_path / "out/snapshots/0000/report.html").read_text()
    assert "contaminated" in page
    assert "joe@site.org" not in page
    assert "ann@site.org" not in page  # nor in the samples of what was refused
    assert "<script>email@" not in page


def test_what_is_not_looked_for_or_not_held_out_is_said(local_ray, config, tmp_path, caplog):
    write(tmp_path / "eval.jsonl", ["a short question", "and its answer"])
    write(tmp_path / "a.jsonl", [sentence(i) for i in range(6)])
    settings = replace(
        config,
        validation_fraction=0.0,
        decontamination=DecontaminationConfig(files=(str(tmp_path / "eval.jsonl"),)),
    )
    manifest = run(settings, tmp_path / "a.jsonl", tmp_path / "out")
    said = [record.getMessage() for record in caplog.records]
    assert any(
        re.search(r"none of the 2 evaluation rows of .*eval\.jsonl can be found", line) for line in said
    )
    assert any(line.startswith("no row is held out for validation") for line in said)
    page = (tmp_path / "out/snapshots/0000/report.html").read_text()
    for words in (
        "nothing was looked for in the data",
        "No row is held out",
        manifest["created_at"],
        "Tokens per second",
    ):
        assert words in page
    assert "No document contains" not in page


def test_a_mixture_has_its_shares(local_ray, config, tmp_path):
    write(tmp_path / "web/a.jsonl", [sentence(i) for i in range(60)])
    write(tmp_path / "code/a.jsonl", [sentence(1000 + i) for i in range(15)])
    web = SourceConfig("web", (str(tmp_path / "web"),), weight=0.5, epochs=1.0)
    code = SourceConfig("code", (str(tmp_path / "code"),), weight=0.5, epochs=2.0)
    settings = replace(config, sources=(web, code))
    manifest = run(settings, None, tmp_path / "out")
    page = (tmp_path / "out/snapshots/0000/report.html").read_text()
    assert "Left unused" in page
    assert page.count("<polygon") == 3  # a step in the funnels of both sources, and of all
    stored = {name: counts["rows"] for name, counts in manifest["dataset"]["sources"].items()}
    epochs = manifest["dataset"]["epochs"]
    assert epochs["code"] == 2.0  # as often as allowed, and the rest in proportion
    data = TokenDataset(str(tmp_path / "out"))
    assert len(data) == 2 * stored["code"] + round(epochs["web"] * stored["web"])
    rows = [row.tobytes() for row in data.rows(np.arange(len(data))).tokens]
    times = [rows.count(row) for row in dict.fromkeys(rows)]
    assert times.count(2) == stored["code"]
    assert times.count(1) == round(epochs["web"] * stored["web"])
    again = replace(settings, sources=(replace(web, weight=0.9), replace(code, weight=0.1)))
    before = content(tmp_path / "out")
    changed = run(again, None, tmp_path / "out")  # other weights cost no work
    assert changed["dataset"]["epochs"]["web"] == 1.0
    assert content(tmp_path / "out") == before
    assert len(TokenDataset(str(tmp_path / "out"))) != len(data)


def test_a_file_that_cannot_be_read_is_named_and_tried_again(local_ray, config, tmp_path):
    for name in "abc":
        write(tmp_path / f"corpus/{name}.jsonl", [sentence(ord(name) * 100 + i) for i in range(10)])
    output = tmp_path / "out"
    listed_before(config, tmp_path / "corpus", output)
    plan = (output / "snapshots/0000/plan/plan.json").read_bytes()
    for name in "bc":  # gone after they were listed
        (tmp_path / f"corpus/{name}.jsonl").rename(tmp_path / f"{name}.jsonl")
    with pytest.raises(UserError, match=r"2 of 3 files could not be read, .*b\.jsonl among them; run again"):
        run(config, tmp_path / "corpus", output)
    (tmp_path / "c.jsonl").rename(tmp_path / "corpus/c.jsonl")
    (output / "snapshots/0000/plan/plan.json").write_bytes(plan)
    manifest = run(config, tmp_path / "corpus", output)  # a single file stops nothing
    assert {Path(name.split("#")[0]).name for name in manifest["counts"]["unreadable_files"]} == {"b.jsonl"}
    kept = [sentence(ord(name) * 100 + i) for name in "ac" for i in range(10)]
    assert documents(output) == sorted(kept)  # c was read again, and nothing of it was taken for a duplicate
    write(tmp_path / "corpus/d.jsonl", [sentence(7)])
    second = run(config, tmp_path / "corpus", output)  # still away: new files do not wait for it
    assert second["counts"]["unreadable_files"] == manifest["counts"]["unreadable_files"]
    (tmp_path / "b.jsonl").rename(tmp_path / "corpus/b.jsonl")
    again = run(config, tmp_path / "corpus", output)
    assert again["snapshot"] == "snapshots/0002"
    assert again["counts"]["unreadable_files"] == []
    assert documents(output) == sorted(
        [*kept, sentence(7), *(sentence(ord("b") * 100 + i) for i in range(10))]
    )


def listed_before(config: PrepareConfig, inputs: Path, output: Path) -> None:
    """Begin a run: list the input and write the plan."""
    found = [("", part) for file in list_inputs([str(inputs)]) for part in cut_file(file, config.unit_bytes)]
    open_output(str(output), stage="prepare", config=config.content(), inputs=given_tokenizer(config))
    listed = config_hash({"": (str(inputs),)})
    write_plan(str(output / "snapshots/0000/plan"), found, config.unit_bytes, listed)


@pytest.mark.parametrize("deduplicates", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_file_that_changes_after_it_was_listed_comes_with_the_next_run(
    local_ray, config, tmp_path, deduplicates
):
    config = config if deduplicates else replace(config, dedup=DedupConfig(exact=False, fuzzy=False))
    write(tmp_path / "corpus/a.jsonl", [sentence(i) for i in range(10)])
    write(tmp_path / "corpus/b.jsonl", [sentence(10)])
    listed_before(config, tmp_path / "corpus", tmp_path / "out")
    write(tmp_path / "corpus/b.jsonl", [sentence(10 + i) for i in range(20)])  # more parts, too
    first = run(config, tmp_path / "corpus", tmp_path / "out")
    assert [Path(name).name for name in first["counts"]["unreadable_files"]] == ["b.jsonl"]
    second = run(config, tmp_path / "corpus", tmp_path / "out")
    assert second["counts"]["unreadable_files"] == []
    assert documents(tmp_path / "out") == sorted(sentence(i) for i in range(30))


def test_evaluation_sets_are_read_anew_by_an_unfinished_run(config, tmp_path):
    write(tmp_path / "eval.jsonl", [sentence(500)])
    config = replace(config, decontamination=DecontaminationConfig(files=(str(tmp_path / "eval.jsonl"),)))
    snapshot = Snapshot(str(tmp_path / "out"), 0)
    before = settle_resources(config, snapshot, [])
    assert settle_resources(config, snapshot, []) == before
    write(tmp_path / "eval.jsonl", [sentence(500), sentence(501)])
    assert settle_resources(config, snapshot, []) != before


def test_a_crash_at_the_very_end_is_made_good(local_ray, config, tmp_path):
    """Between the two manifests, and before the clean-up."""
    write(tmp_path / "corpus/a.jsonl", [sentence(i) for i in range(10)])
    run(config, tmp_path / "corpus", tmp_path / "out")
    before = (tmp_path / "out/manifest.json").read_bytes()
    write(tmp_path / "corpus/b.jsonl", [sentence(10 + i) for i in range(10)])
    second = run(config, tmp_path / "corpus", tmp_path / "out")
    (tmp_path / "out/manifest.json").write_bytes(before)
    (tmp_path / "out/snapshots/0001/clean.json").unlink()
    left = tmp_path / "out/snapshots/0001/dedup/documents-of-an-attempt/combined"
    left.mkdir(parents=True)
    assert run(config, tmp_path / "corpus", tmp_path / "out") == second
    assert documents(tmp_path / "out") == sorted(sentence(i) for i in range(20))
    assert not left.exists()
    assert list((tmp_path / "out/documents").iterdir()) == []
    (tmp_path / "out/snapshots/0001/clean.json").unlink()
    left.mkdir(parents=True)
    write(tmp_path / "corpus/c.jsonl", [sentence(20 + i) for i in range(10)])
    third = run(config, tmp_path / "corpus", tmp_path / "out")  # with new files, too
    assert third["snapshot"] == "snapshots/0002"
    assert not left.exists()


def test_another_input_for_an_unfinished_snapshot_is_listed(local_ray, config, tmp_path):
    write(tmp_path / "rubbish.jsonl", [""])
    write(tmp_path / "good.jsonl", [sentence(i) for i in range(10)])
    with pytest.raises(UserError, match="1 of 1 records cannot be used"):
        run(config, tmp_path / "rubbish.jsonl", tmp_path / "out")
    run(config, tmp_path / "good.jsonl", tmp_path / "out")
    assert documents(tmp_path / "out") == sorted(sentence(i) for i in range(10))


@pytest.fixture(scope="module")
def crowded(tmp_path_factory) -> Path:
    """A corpus of some 30 units, a third of it duplicates."""
    folder = tmp_path_factory.mktemp("crowded")
    texts = [sentence(i) for i in range(100)]
    texts += [near(texts[i]) if i % 4 else texts[i] for i in range(0, 100, 2)]
    for number in range(6):
        write(folder / f"{number}.jsonl", texts[number::6])
    return folder


@pytest.fixture(scope="module")
def undisturbed(local_ray, crowded, tokenizer, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    run(crowded_config(tokenizer), crowded, output)
    return content(output)


def crowded_config(tokenizer: str) -> PrepareConfig:
    return PrepareConfig(
        row_length=64,
        tokenizer=tokenizer,
        validation_fraction=0.1,
        dedup=DedupConfig(bands=40, rows=4, lines=True, min_line_chars=20, partitions=4),
        unit_bytes=2000,
        rows_per_shard=20,
    )


@pytest.mark.parametrize("seed", [0, *LONGER])
def test_killed_workers_change_nothing(local_ray, crowded, undisturbed, tokenizer, tmp_path, seed):
    """SIGKILL of a busy worker again and again, at random moments."""
    chosen, killed, done = random.Random(seed), [], threading.Event()

    def kill() -> None:
        while not done.is_set() and len(killed) < 3:
            time.sleep(chosen.uniform(0.1, 0.6))
            busy = [p for p in psutil.Process().children(recursive=True) if "MapBatches(" in command(p)]
            if busy:
                victim = chosen.choice(busy)
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
                    killed.append(victim.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        run(crowded_config(tokenizer), crowded, tmp_path / "out")
    finally:
        done.set()
        killer.join()
    assert killed, "the run ended before any worker was killed"
    assert content(tmp_path / "out") == undisturbed


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.parametrize("seed", [0, *LONGER])
def test_a_killed_driver_is_made_good_by_the_same_command(
    crowded, undisturbed, tokenizer, tmp_path, tracking_uri, seed
):
    """SIGKILL of the command at a random moment after its first unit: its Ray goes with it, and, rerun, only what is missing is
    done."""
    recipe = replace(tiny(), prepare=crowded_config(tokenizer))
    (tmp_path / "recipe.json").write_text(to_json(recipe))
    arguments = [str(tmp_path / "recipe.json"), "--input", str(crowded), "--output", str(tmp_path / "out")]
    arguments += ["--tracking-uri", tracking_uri, "--no-progress"]
    with open(tmp_path / "log", "wb") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "pipelines.prepare", *arguments], stdout=log, stderr=log, cwd=REPOSITORY
        )
        try:
            deadline = time.monotonic() + 200
            while not list((tmp_path / "out/documents").glob("*.json")) and driver.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(random.Random(seed).uniform(0, 2))
            assert driver.poll() is None, (tmp_path / "log").read_text()
            # Ray's two agents end by themselves too, but only some time after they miss their raylet.
            children = psutil.Process(driver.pid).children(recursive=True)
            started = [process for process in children if "Agent" not in command(process)]
        finally:
            driver.kill()
            driver.wait()
    assert len(started) > 2
    _, left = psutil.wait_procs(started, timeout=180)
    assert not left, f"still running: {[process.pid for process in left]}"
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/documents").glob("*.json")}
    assert finished
    assert not (tmp_path / "out/manifest.json").exists()
    config = replace(crowded_config(tokenizer), keep_documents=True)
    run(config, crowded, tmp_path / "out")
    assert content(tmp_path / "out") == undisturbed | {
        name: data for name, data in content(tmp_path / "out").items() if name.startswith("documents/")
    }
    assert finished == {p: p.stat().st_mtime_ns for p in finished}, "a finished unit was done again"


def test_a_snapshot_on_s3(local_ray, s3_url, config, tmp_path, monkeypatch):
    """The whole of it, deduplication included, through a real S3 server: the same bytes as on disk."""
    from llada.files import read_bytes, write_bytes

    monkeypatch.setenv("LLADA_CACHE", str(tmp_path / "cache"))
    texts = [sentence(i) for i in range(30)]
    write(tmp_path / "corpus/a.jsonl", [*texts, near(texts[0])])
    write_bytes(f"{s3_url}/grown/corpus/a.jsonl", (tmp_path / "corpus/a.jsonl").read_bytes())
    run(config, tmp_path / "corpus", tmp_path / "out")
    prepare(
        config,
        inputs=[f"{s3_url}/grown/corpus"],
        output=f"{s3_url}/grown-out",
        cluster=ClusterConfig(),
        progress=False,
    )
    local, remote = content(tmp_path / "out"), f"{s3_url}/grown-out"
    assert local
    for name, data in local.items():
        assert read_bytes(f"{remote}/{name}") == data, name
    assert read_manifest(remote)["counts"]["filtered"] == {"duplicate": 1}
    write(tmp_path / "corpus/b.jsonl", [near(texts[1]), sentence(99)])
    write_bytes(f"{s3_url}/grown/corpus/b.jsonl", (tmp_path / "corpus/b.jsonl").read_bytes())
    prepare(config, inputs=[f"{s3_url}/grown/corpus"], output=remote, cluster=ClusterConfig(), progress=False)
    assert read_manifest(remote)["counts"]["filtered"] == {"duplicate_of_earlier_snapshot": 1}


@pytest.mark.parametrize("seed", [0, *LONGER])
def test_a_store_that_goes_away_again_and_again_changes_nothing(
    local_ray, s3_url, s3_gateway, crowded, undisturbed, tokenizer, tmp_path, monkeypatch, seed
):
    """Every connection to the store is cut and refused for two seconds at a time, at random moments of the run."""
    from llada.files import read_bytes, write_bytes

    monkeypatch.setenv("LLADA_CACHE", str(tmp_path / "cache"))
    source, output = f"{s3_url}/outages-{seed}/{crowded.name}", f"{s3_url}/outages-{seed}/out"
    for file in crowded.iterdir():
        write_bytes(f"{source}/{file.name}", file.read_bytes())
    chosen, outages, done = random.Random(seed), [], threading.Event()

    def disturb() -> None:
        while not done.wait(chosen.uniform(0.5, 2)) and len(outages) < 3:
            s3_gateway.close()
            outages.append(time.monotonic())
            time.sleep(2)
            s3_gateway.open()

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        config = crowded_config(tokenizer)
        prepare(config, inputs=[source], output=output, cluster=ClusterConfig(), progress=False)
    finally:
        done.set()
        disturber.join()
    assert len(outages) >= 3
    assert read_manifest(output)["counts"]["unreadable_files"] == []
    for name, data in undisturbed.items():
        assert read_bytes(f"{output}/{name}") == data, name
