"""prepare as it is scheduled: nights on a bucket that grows, through S3's protocol, one of them killed, one with nothing new."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import s3fs
from transformers import PreTrainedTokenizerFast

from llada.data.dedup.steps import DedupConfig
from llada.data.tokens.manifest import resolve_snapshot
from llada.data.tokens.shards import TokenDataset
from llada.data.work.config import PrepareConfig
from llada.files import read_bytes, write_bytes
from llada.presets import tiny
from llada.settings import to_json
from llada.tokenizer import save_tokenizer, train_tokenizer
from pipelines.stage.artifact import read_manifest

pytestmark = pytest.mark.integration
REPOSITORY = Path(__file__).resolve().parents[2]
SYLLABLES = ("ba", "de", "ki", "lo", "mu", "na", "po", "ra", "sel", "tin")


def sentence(seed: int) -> str:
    chosen = random.Random(seed)
    return " ".join("".join(chosen.choices(SYLLABLES, k=3)) for _ in range(60))


def put(url: str, texts: list[str]) -> None:
    write_bytes(url, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())


def objects(url: str) -> dict[str, str]:
    """{name: ETag} of what stands below a folder of the bucket."""
    store = s3fs.S3FileSystem(use_listings_cache=False)
    return {name: entry["ETag"] for name, entry in store.find(url, detail=True).items() if entry["size"]}


def documents(url: str, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts of all splits, sorted."""
    found: list[str] = []
    for split in ("train", "validation"):
        data = TokenDataset(url, split)
        rows = data.rows(np.arange(len(data)))
        text = tokenizer.decode(rows.tokens[rows.segment_ids >= 0])
        found += text.split("<|endoftext|>")[:-1]
    return sorted(found)


def kill_a_night(command: list[str], output: str, log: Path) -> dict[str, str]:
    """Give a command and kill it when a unit is done; {name: ETag} of the units that it has done."""
    before = objects(f"{output}/documents")
    with log.open("wb") as stream:
        night = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *command], stdout=stream, stderr=stream, cwd=REPOSITORY
        )
        deadline = time.monotonic() + 240
        try:
            while not (done := objects(f"{output}/documents").keys() - before.keys()):
                assert night.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            night.kill()
            night.wait()
    return {name: tag for name, tag in objects(f"{output}/documents").items() if name in done}


@pytest.mark.timeout(600)
@pytest.mark.slow  # tests/pipelines/test_prepare_corpus.py has each of its parts: growth, S3, a killed driver, nothing new
@pytest.mark.parametrize("is_killed", [False, True])
def test_nights_on_a_bucket_that_grows(
    local_ray: Path,
    s3_url: str,
    tmp_path: Path,
    tracking_uri: str,
    llada: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    is_killed: bool,
):
    monkeypatch.setenv("LLADA_CACHE", str(tmp_path / "cache"))
    raw, output = f"{s3_url}/nights-{is_killed}/raw", f"{s3_url}/nights-{is_killed}/data"
    texts = [sentence(seed) for seed in range(60)]
    tokenizer = train_tokenizer(texts[:20], 320)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    prepare = PrepareConfig(
        row_length=64,
        tokenizer=str(tmp_path / "tokenizer"),
        validation_fraction=0.1,
        unit_bytes=6000,
        rows_per_shard=50,
        dedup=DedupConfig(exact=True, fuzzy=False, partitions=1),
    )
    (tmp_path / "recipe.json").write_text(to_json(replace(tiny(), prepare=prepare)))
    command = ["prepare", str(tmp_path / "recipe.json"), "--input", raw, "--output", output]
    command += ["--tracking-uri", tracking_uri, "--no-progress"]

    # The first night.
    put(f"{raw}/2026-11-01/a.jsonl", texts[:20])
    assert llada(*command)[0] == 0
    assert read_manifest(output)["snapshot"] == "snapshots/0000"

    # The second one; killed as soon as it has finished a unit of its own, and given again, it does what is missing.
    put(f"{raw}/2026-11-02/b.jsonl", texts[20:])
    first = objects(f"{output}/snapshots/0000")
    units = kill_a_night(command, output, tmp_path / "log") if is_killed else {}
    if is_killed:  # a training that starts now gets a whole one
        assert resolve_snapshot(output) == f"{output}/snapshots/0000"
        assert documents(output, tokenizer) == sorted(texts[:20])
    assert llada(*command)[0] == 0
    manifest = read_manifest(output)
    assert manifest["snapshot"] == "snapshots/0001"
    assert (manifest["counts"]["files"], manifest["counts"]["documents_kept"]) == (1, 40)
    assert documents(output, tokenizer) == sorted(texts)
    assert objects(f"{output}/snapshots/0000") == first
    after = objects(f"{output}/documents")
    assert {name: after.get(name, tag) for name, tag in units.items()} == units

    # The third night finds nothing new: no snapshot, and nothing is written again.
    whole = objects(output)
    code, said, _ = llada(*command)
    assert code == 0
    assert said.startswith(f"{output}: ")
    assert read_manifest(output) == manifest
    changed = {name for name, tag in objects(output).items() if whole.get(name) != tag}
    assert changed == set()
    assert read_bytes(f"{output}/snapshots/0001/manifest.json")
