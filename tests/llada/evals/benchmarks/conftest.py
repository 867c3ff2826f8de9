"""A folder of all benchmarks, a few documents of each."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

SHARED = Path(os.environ.get("LLADA_SHARED", Path(__file__).resolve().parents[5] / "shared"))
DATA = SHARED / "data" / "eval"
# Of these there are no rows with the others: made up in the fields of their data sets.
GPQA = {
    "Question": "Which is it?", "Correct Answer": "this", "Incorrect Answer 1": "that",
    "Incorrect Answer 2": "none", "Incorrect Answer 3": "all",
}  # fmt: skip
MMLU_PRO = {
    "question_id": 1, "question": "How much is 1 + 1?", "options": ["1", "2 ", "3"], "answer": "B", "answer_index": 1,
    "category": "computer science", "cot_content": "A: Let's think step by step. It is 2. The answer is (B).",
}  # fmt: skip
IFEVAL = {
    "key": 1, "prompt": "Write a word. Use no comma.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]
}  # fmt: skip


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of each file of real ones, and of those made up; examples as they are."""
    if not DATA.is_dir():
        pytest.skip(f"no {DATA}: set LLADA_SHARED")
    folder = tmp_path_factory.mktemp("eval")
    for path in DATA.glob("*.jsonl"):
        lines = path.read_text().splitlines()
        if ".fewshot" not in path.name:
            # Of subjects and tasks, all documents of the first three.
            groups = [key for key in ("subject", "task", "type") if key in json.loads(lines[0])]
            of = [json.loads(line).get(groups[0]) if groups else None for line in lines]
            first = list(dict.fromkeys(of))[:3]
            lines = [line for line, group in zip(lines, of, strict=True) if group in first][:8]
        (folder / path.name).write_text("\n".join(lines) + "\n")
    for name, row in (
        ("mmlu_pro", MMLU_PRO),
        ("mmlu_pro.fewshot", MMLU_PRO),
        ("ifeval", IFEVAL),
    ):
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 6)
    # A question is never its own example, nor is one that equals it.
    rows = [{**GPQA, "Question": "Which is it?" + "?" * number} for number in range(6)]
    (folder / "gpqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool = (DATA / "winogrande.jsonl").read_text().splitlines()[50:]
    (folder / "winogrande.fewshot.jsonl").write_text("\n".join(pool) + "\n")
    return folder


GSM8K_CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
---
"""
COMMIT = "a" * 40


class HubHandler(BaseHTTPRequestHandler):
    """What `datasets` asks a Hugging Face hub: files with their commit, lists of files, and refusals."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, dict[str, bytes]]] = {}
    gated: ClassVar[set[str]] = set()
    forbidden: ClassVar[set[str]] = set()
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def _answer(self, body: bytes) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.asked.append("/".join(parts))
        is_api = parts[0] == "api"
        kind, owner, name, *rest = [*parts[is_api:], "", "", ""]
        repo, rest = f"{owner}/{name}", [part for part in rest if part]
        if repo in self.forbidden:
            return self._send(403)
        if repo in self.gated:
            return self._send(401, {"X-Error-Code": "GatedRepo"})
        if kind != "datasets" or repo not in self.files:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        files = self.files[repo]
        if not is_api:
            file = "/".join(rest[2:])
            commit = {"X-Repo-Commit": COMMIT}
            if file not in files:
                return self._send(404, {"X-Error-Code": "EntryNotFound", **commit})
            return self._send(200, {"ETag": f'"{_sha(files[file])}"', **commit}, files[file])
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": _sha(content)}
            for path, content in files.items()
        ]
        if rest[:1] == ["tree"]:
            found: Any = [entry for entry in entries if str(entry["path"]).startswith("/".join(rest[2:]))]
        elif rest[:1] == ["paths-info"]:
            wanted = parse_qs(body.decode())["paths"]
            found = [entry for entry in entries if entry["path"] in wanted]
        else:
            siblings = [{"rfilename": path} for path in files]
            found = {"id": repo, "sha": COMMIT, "private": False, "gated": False, "siblings": siblings}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(found).encode())

    def _send(self, status: int, headers: dict[str, str] | None = None, content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(data: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub on the loopback with real rows of GSM8K, a gated GPQA and a PIQA that it forbids: (its address, what it was
    asked)."""

    files = {
        "README.md": GSM8K_CARD.encode(),
        "main/train.jsonl": (data / "gsm8k.fewshot.jsonl").read_bytes(),
        "main/test.jsonl": (data / "gsm8k.jsonl").read_bytes(),
    }
    kept: dict[str, Any] = {
        "files": {"openai/gsm8k": files},
        "gated": {"Idavidrein/gpqa"},
        "forbidden": {"baber/piqa"},
        "asked": [],
    }
    handler = type("Handler", (HubHandler,), kept)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", kept["asked"]
    server.shutdown()
    thread.join()
    server.server_close()
