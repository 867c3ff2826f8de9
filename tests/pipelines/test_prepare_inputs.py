"""prepare on folders as people have them: what is read of them, and how the rest is told."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from llada.data.tokens.shards import TokenDataset
from llada.data.work.config import PrepareConfig
from llada.data.work.read_config import ReadConfig
from llada.errors import UserError
from llada.files import write_bytes
from llada.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from pipelines.prepare import prepare
from pipelines.stage.artifact import read_manifest
from pipelines.stage.cluster import ClusterConfig

pytestmark = pytest.mark.integration
TEXTS = [f"Document number {i} speaks of {i * i} things, and of more." for i in range(60)]


def lines(texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def warc() -> bytes:
    def record(kind: str, content_type: str, body: bytes) -> bytes:
        head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        return gzip.compress(head.encode() + body + b"\r\n\r\n")

    conversions = (record("conversion", "text/plain", text.encode()) for text in TEXTS[50:])
    return b"".join([record("warcinfo", "application/warc-fields", b"x"), *conversions])


FILES = {
    "a.jsonl": lines(TEXTS[:10]),
    "b.json": json.dumps([{"text": text} for text in TEXTS[10:20]], indent=2).encode(),
    "deep/c::1.csv": (
        "id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS[20:30]))
    ).encode(),
    "deep/t.parquet/part-0.tsv.gz": gzip.compress(("text\n" + "\n".join(TEXTS[30:40])).encode()),
    "e.wet.gz": warc(),
    "README.md": b"x",
    "f.jsonl.lz4": b"x",
    "g.jsonl": b"",
    "dataset_infos.json": json.dumps({"default": {"features": {}}}, indent=2).encode(),
    ".cache/x.jsonl": lines(["hidden"]),
}
LEFT_OUT = {
    "*.md": 1,
    "*.jsonl.lz4": 1,
    "empty": 1,
    "hidden": 1,
    "JSON object without 'text'": 1,
    "the output itself": 1,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PrepareConfig:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(TEXTS, 300), folder)
    return PrepareConfig(row_length=32, tokenizer=str(folder), validation_fraction=0.2)


def run(config, inputs, output, **options):
    given = [inputs] if isinstance(inputs, str) else inputs
    return prepare(config, inputs=given, output=output, cluster=ClusterConfig(), progress=False, **options)


def texts_of(output: str) -> list[str]:
    tokenizer = load_tokenizer(f"{output}/tokenizer") if "://" not in output else None
    found = []
    for split in ("train", "validation"):
        data = TokenDataset(output, split)
        rows = data.rows(range(len(data)))
        if tokenizer:
            found += tokenizer.decode(rows.tokens[rows.segment_ids >= 0]).split("<|endoftext|>")[:-1]
    return sorted(found)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_folder_as_people_have_them(local_ray, config, place, tmp_path, request, caplog, monkeypatch):
    """Output and the store of MLflow lie in the input; a second run finds nothing new."""
    monkeypatch.setenv("LLADA_CACHE", str(tmp_path / "cache"))
    root = str(tmp_path) if place == "local" else f"{request.getfixturevalue('s3_url')}/{tmp_path.name}"
    inputs, output = f"{root}/in[1]", f"{root}/in[1]/out"
    for name, data in FILES.items():
        write_bytes(f"{inputs}/{name}", data)
    write_bytes(f"{root}/elsewhere/d.jsonl", lines(TEXTS[40:50]))
    given = [inputs, f"{root}/elsewhere"]
    if place == "local":
        (Path(inputs) / "link").symlink_to(f"{root}/elsewhere")
        (Path(inputs) / "loop").symlink_to(inputs)
        given = [inputs]
    manifest = run(config, given, output)
    counts = manifest["counts"]
    assert counts["documents_kept"] == 60
    assert counts["skipped"] == {"warcinfo": 1}
    assert {reason: entry["files"] for reason, entry in counts["left_out"].items()} == LEFT_OUT
    assert any("left out of the input: " in text and "in[1]/README.md" in text for text in caplog.messages)
    if place == "local":
        assert texts_of(output) == sorted(TEXTS)
        page = Path(output, "snapshots/0000/report.html").read_text()
        assert all(reason.split(" '")[0] in page for reason in LEFT_OUT)
    write_bytes(f"{inputs}/more.rar", b"x")
    if place == "local":
        write_bytes(f"{inputs}/mlartifacts/1/manifest.json", b"{}")
        write_bytes(f"{inputs}/mlflow.db", b"x")
    caplog.clear()
    assert run(config, given, output) == manifest == read_manifest(output)
    assert any("*.rar 1" in text for text in caplog.messages), "what is new and not read is told too"


def test_the_terminal_says_what_was_left_out(local_ray, llada, tmp_path, tracking_uri, config):
    for name, data in FILES.items():
        write_bytes(f"{tmp_path}/in/{name}", data)
    words = ["tiny", "--row-length", "32", "--no-progress", "--tokenizer", config.tokenizer]
    words += ["--read.min-chars", "1", "--tracking-uri", tracking_uri]
    code, out, err = llada("prepare", *words, "--input", f"{tmp_path}/in", "--output", f"{tmp_path}/out")
    assert code == 0, err
    last_line = out.splitlines()[-1]
    assert last_line.startswith("left out: files 5: *.jsonl.lz4 1 (in/f.jsonl.lz4), *.md 1 (in/README.md)")
    assert last_line.endswith("; records that hold no text 1: warcinfo 1")


def test_an_error_says_what_was_left_out(local_ray, config, tmp_path):
    write_bytes(f"{tmp_path}/in/a.json", b"{}")
    write_bytes(f"{tmp_path}/in/README.md", b"x")
    write_bytes(f"{tmp_path}/in/b.jsonl", lines(["", " "]))
    lenient = replace(config, max_invalid_fraction=1)
    with pytest.raises(UserError, match=r"no training rows .*\*\.md 1 \(in/README\.md\)") as caught:
        run(lenient, f"{tmp_path}/in", f"{tmp_path}/out")
    assert "JSON object without 'text' 1" in str(caught.value)
    write_bytes(f"{tmp_path}/table/a.csv", b"id,content\n1,x\n")
    for trained in (config, PrepareConfig(row_length=32, train_tokenizer_vocab=300)):
        with pytest.raises(UserError, match="no field .text., but .id., .content."):
            run(trained, f"{tmp_path}/table", f"{tmp_path}/out-{trained.tokenizer is None}")
    named = PrepareConfig(
        row_length=8, tokenizer=config.tokenizer, validation_fraction=0, read=ReadConfig(text_field="content")
    )
    assert run(named, f"{tmp_path}/table", f"{tmp_path}/out-named")["counts"]["documents_kept"] == 1


def test_an_output_that_is_the_input(config, tmp_path):
    write_bytes(f"{tmp_path}/in/a.jsonl", lines(TEXTS))
    for inputs in ("in", "in/*", "in/a.jsonl"):
        with pytest.raises(UserError, match=r"nothing to read in .*: it lies in the output; choose another"):
            run(config, f"{tmp_path}/{inputs}", f"{tmp_path}/./in/")
    with pytest.raises(UserError, match=r"nothing to read in .*: it lies in the output"):
        run(config, f"{tmp_path}/in/*", f"{tmp_path}/out", written=[str(tmp_path)])
    assert [str(path) for path in tmp_path.rglob("*.*")] == [f"{tmp_path}/in/a.jsonl"]
