"""A team's way on one cluster of two nodes that wants a token, with the commands of README ("On a cluster"): jobs that prepare what
is new, a training whose machine is lost and comes back, an endpoint that rolls to another champion under load, an answer's origin."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import yaml

from llada.tokenizer import save_tokenizer, train_tokenizer
from llada.training.checkpoint.folder import complete_checkpoints
from pipelines.stage.artifact import read_manifest
from pipelines.stage.metrics import read_metrics

Command = Callable[..., tuple[int, str, str]]
README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
STEPS, PER_CHECKPOINT = 700, 20
SMALL = [
    "--model.d-model=32", "--model.num-layers=2", "--model.num-heads=2", "--model.ffn-dim=64", "--train.samples=0",
    "--train.global-batch-tokens=1024", "--train.validation-rows=8", "--train.log-every=5",
    f"--train.checkpoint-every={PER_CHECKPOINT}",
]  # fmt: skip


def shown(root: Path, port: int) -> dict[str, list[str]]:
    """{command: its words} of README's way, with this machine's places for those that stand there."""
    (block,) = re.findall(r"^## On a cluster\n.*?```bash\n(.*?)```", README, re.DOTALL | re.MULTILINE)
    here = {
        "s3://bucket": str(root),
        "llada_8b": "tiny",
        "ray_configs/cpu_cluster.yaml": "cluster.yaml",
        "ray_configs/cluster.yaml": "cluster.yaml",
        "ray_configs/serve_8b.yaml": "serve.yaml",
        "localhost:8000": f"127.0.0.1:{port}",
    }
    found = {}
    for line in block.splitlines():
        for there, place in here.items():
            line = line.replace(there, place)
        _, *words = shlex.split(line, comments=True)
        found[words[1] if words[0] == "submit" else words[0]] = words
    return found


def wait_until(holds: Callable[[], object], patience_s: float = 240) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_from_text_to_an_endpoint_on_two_nodes(
    ray_cluster, corpus, tmp_path, llada: Command, monkeypatch, free_port
):
    monkeypatch.setenv("RAY_AUTH_TOKEN", ray_cluster.token)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray_cluster.address)
    monkeypatch.chdir(tmp_path)
    root = ray_cluster.folder / "journey"
    raw, data, base, tuned = root / "raw", root / "data", root / "8b", root / "tuned"
    raw.mkdir(parents=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    tracked = ["--tracking-uri", f"sqlite:///{root / 'mlflow.db'}"]
    words = shown(root, port := free_port())
    Path("cluster.yaml").write_text(
        "address: auto\nnum_workers: [1, 2]\ncpus_per_worker: 2\nresize_every_s: 2\ndata_workers: 2\n"
    )

    def run(command: list[str], *more: str) -> str:
        code, out, err = llada(*command, *more)
        assert code == 0, out + err
        return out

    lines = (corpus / "text.jsonl").read_text().splitlines(keepends=True)
    save_tokenizer(train_tokenizer([json.loads(line)["text"] for line in lines], 320), root / "tokenizer")

    with contextlib.ExitStack() as second:
        second.enter_context(ray_cluster.node(cpus=2))

        # Preparation: what is there, then what is new.
        (raw / "monday.jsonl").write_text("".join(lines[:150]))
        prepare = [*words["prepare"], *tracked, "--row-length=32", "--validation-fraction=0.2"]
        run(prepare)
        (raw / "tuesday.jsonl").write_text("".join(lines[150:]))
        run(prepare)
        assert read_manifest(str(data))["snapshot"] == "snapshots/0001"

        # A training: its second machine is lost without a word, and comes back.
        train = [
            *words["pretrain"],
            *tracked,
            *SMALL,
            f"--train.num-steps={STEPS}",
            f"--train.validate-every={STEPS}",
        ]
        run([train[0], "--no-wait", *train[1:]])
        wait_until(lambda: complete_checkpoints(str(base / "checkpoints")))
        second.close()
        lost_at = complete_checkpoints(str(base / "checkpoints"))[-1]
        wait_until(lambda: complete_checkpoints(str(base / "checkpoints"))[-1] > lost_at + PER_CHECKPOINT)
        second.enter_context(ray_cluster.node(cpus=2))
        run(train)  # which is at work: follows it
        steps = [event.step for event in read_metrics(str(base)) if event.name == "step"]
        assert steps == list(range(5, STEPS + 1, 5))
        attempts = [
            path.read_text().splitlines()[0] for path in sorted((base / "metrics").glob("*-000000.jsonl"))
        ]
        assert [json.loads(attempt)["workers"] for attempt in attempts] == [2, 1, 2]

        # Another checkpoint, which goes on from it.
        run(
            [word if word != str(base) else str(tuned) for word in words["pretrain"]],
            *tracked, "--model", str(base), "--train.num-steps=20", "--train.validate-every=20",
            *[word for word in SMALL if not word.startswith("--model")],
        )  # fmt: skip

        # The endpoint, from one champion to the next under load; then to one that is none.
        def configure(model: str) -> None:
            application = {
                "name": "llada",
                "route_prefix": "/",
                "import_path": "pipelines.serve:build_app",
                "args": {"model": model, "model_id": "m", "cpus_per_replica": 1},
            }
            config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
            Path("serve.yaml").write_text(yaml.safe_dump(config))
            run(["check", "serve.yaml"])

        def ask() -> httpx.Response:
            body = {"model": "m", "prompt": "The loss", "max_tokens": 8}
            return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=120)

        configure("models:/tiny-pretrain@champion")
        run(words["promote"])
        run(words["deploy"])
        answers, is_over = [ask()], threading.Event()

        def load() -> None:
            while not is_over.is_set():
                answers.append(ask())

        clients = [threading.Thread(target=load) for _ in range(2)]
        for client in clients:
            client.start()
        try:
            run(["promote", str(tuned), "--max-worse", "10"])
            run(words["deploy"])
            answers.append(ask())
            configure(str(root / "none"))
            code, _, err = llada(*words["deploy"])
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

        # From the endpoint, and from its first answer, back to the text.
        now = json.loads(run(words["lineage"], "--json"))
        then = json.loads(run(["lineage", answers[0].json()["id"], "--json"]))
    snapshot = f"{data}/snapshots/0001"
    assert (now["folder"], then["folder"]) == (str(tuned), str(base))
    assert now["folders"].keys() == {str(tuned), str(base), snapshot}
    assert then["folders"].keys() == {str(base), snapshot}
    read = [(files["files"], files["first_files"]) for files in now["folders"][snapshot]["raw"]]
    assert read == [(1, [str(raw / "monday.jsonl")]), (1, [str(raw / "tuesday.jsonl")])]
    assert len({folder["mlflow_run_id"] for folder in now["folders"].values()}) == 3
