"""A team's way on one cluster of two nodes that wants a token, with the commands of README: jobs that prepare what is new, a
training whose machine is lost and comes back, an endpoint that rolls to another checkpoint under load."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import yaml

from llada.training.checkpoint.folder import complete_checkpoints
from pipelines.stage.artifact import read_manifest
from pipelines.stage.metrics import read_metrics

Command = Callable[..., tuple[int, str, str]]
STEPS, PER_CHECKPOINT = 700, 20
SMALL = [
    "--model.d-model=32", "--model.num-layers=2", "--model.num-heads=2", "--model.ffn-dim=64", "--train.samples=0",
    "--train.global-batch-tokens=1024", "--train.validate-every=1000", "--train.validation-rows=8", "--train.log-every=5",
    f"--train.checkpoint-every={PER_CHECKPOINT}",
]  # fmt: skip


def wait_until(holds: Callable[[], object], patience_s: float = 240) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_from_text_to_an_endpoint_on_two_nodes(ray_cluster, corpus, tmp_path, llada: Command, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", ray_cluster.token)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray_cluster.address)
    monkeypatch.chdir(tmp_path)
    root = ray_cluster.folder / "journey"
    raw, data, base = root / "raw", root / "data", root / "base"
    raw.mkdir(parents=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    tracked = ["--tracking-uri", f"sqlite:///{root / 'mlflow.db'}", "--cluster", "cluster.yaml"]
    Path("cluster.yaml").write_text(
        "address: auto\nnum_workers: [1, 2]\ncpus_per_worker: 2\nresize_every_s: 2\ndata_workers: 2\n"
    )

    def submit(*words: str) -> None:
        code, out, err = llada("submit", *words, *tracked)
        assert code == 0, out + err

    with contextlib.ExitStack() as second:
        second.enter_context(ray_cluster.node(cpus=2))

        # Preparation: what is there, then what is new.
        lines = (corpus / "text.jsonl").read_text().splitlines(keepends=True)
        (raw / "monday.jsonl").write_text("".join(lines[:150]))
        words = ["prepare", "tiny", "--input", f"{raw}/*.jsonl", "--output", str(data)]
        words += ["--row-length=32", "--train-tokenizer-vocab=320", "--validation-fraction=0.2"]
        submit(*words)
        (raw / "tuesday.jsonl").write_text("".join(lines[150:]))
        submit(*words)
        assert read_manifest(str(data))["snapshot"] == "snapshots/0001"

        # A training: its second machine is lost without a word, and comes back.
        train = ["pretrain", "tiny", "--data", str(data), "--output", str(base), *SMALL]
        train += [f"--train.num-steps={STEPS}"]
        submit("--no-wait", *train)
        wait_until(lambda: complete_checkpoints(str(base / "checkpoints")))
        second.close()
        lost_at = complete_checkpoints(str(base / "checkpoints"))[-1]
        wait_until(lambda: complete_checkpoints(str(base / "checkpoints"))[-1] > lost_at + PER_CHECKPOINT)
        second.enter_context(ray_cluster.node(cpus=2))
        submit(*train)  # which is at work: follows it
        steps = [event.step for event in read_metrics(str(base)) if event.name == "step"]
        assert steps == list(range(5, STEPS + 1, 5))
        attempts = [
            path.read_text().splitlines()[0] for path in sorted((base / "metrics").glob("*-000000.jsonl"))
        ]
        assert [json.loads(attempt)["workers"] for attempt in attempts] == [2, 1, 2]

        # Another checkpoint, which goes on from it.
        tuned = root / "tuned"
        submit("pretrain", "tiny", "--data", str(data), "--output", str(tuned), "--model", str(base),
               *[word for word in SMALL if not word.startswith("--model")], "--train.num-steps=20")  # fmt: skip

        # The endpoint, from one checkpoint to the other under load; then to one that is none.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]

        def deploy(model: Path) -> tuple[int, str, str]:
            application = {
                "name": "llada",
                "route_prefix": "/",
                "import_path": "pipelines.serve:build_app",
                "args": {"model": str(model), "model_id": "m", "cpus_per_replica": 1},
            }
            config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
            Path("serve.yaml").write_text(yaml.safe_dump(config))
            return llada("deploy", "serve.yaml")

        def ask() -> httpx.Response:
            body = {"model": "m", "prompt": "The loss", "max_tokens": 8}
            return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=120)

        code, _, err = deploy(base)
        assert code == 0, err
        answers, is_over = [ask()], threading.Event()

        def load() -> None:
            while not is_over.is_set():
                answers.append(ask())

        clients = [threading.Thread(target=load) for _ in range(2)]
        for client in clients:
            client.start()
        try:
            code, _, err = deploy(tuned)
            assert code == 0, err
            answers.append(ask())
            code, _, err = deploy(root / "none")
            assert code == 1
            assert "what was served before goes on" in err
        finally:
            is_over.set()
            for client in clients:
                client.join()
        answers.append(ask())
        assert {answer.status_code for answer in answers} == {200}
        prints = [answer.json()["system_fingerprint"] for answer in answers]
        assert len(set(prints)) == 2
        assert prints[0] != prints[-1]

    # From the answer back to the text.
    manifest = read_manifest(str(tuned))
    sources = {entry["url"] for entry in manifest["inputs"]}
    assert sources == {str(base), f"{data}/snapshots/0001"}
    assert {entry["url"] for entry in read_manifest(str(base))["inputs"]} == {f"{data}/snapshots/0001"}
    snapshot = read_manifest(f"{data}/snapshots/0001")
    assert manifest["mlflow_run_id"] != snapshot["mlflow_run_id"]
