"""The stage `generate`: batch inference over a file of prompts, by a Ray Data actor pool.

A prompt line is JSON, {"prompt": text} or {"messages": [...]}, other fields being copied to the answer; in a .txt file
it is plain text. Answers stand in the order of the prompts:
    <output>/generations.jsonl     blocks/  finished blocks (what a rerun skips)     manifest.json  last
Prompt i is seeded with seed + i: block size and number of actors change nothing.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import llada
from llada.data.read.dialogues import RecordError, parse_dialogue
from llada.files import absolute, join, read_bytes, write_bytes
from llada.sampling.sampler import SamplingConfig
from llada.sampling.text import complete_texts
from llada.training.parallel import resolve_precision, training_device
from pipelines.runners.actors import map_blocks, require_checkpoint
from pipelines.stage.artifact import (
    StageError,
    fetch_folder,
    find_manifest,
    folder_id,
    open_output,
    storage_errors,
)
from pipelines.stage.cluster import ClusterConfig, connect
from pipelines.stage.tracking import Tracker


@dataclass(frozen=True)
class GenerateConfig:
    """How to answer the prompts."""

    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    batch_rows: int = 16  # prompts denoised together
    chat: bool = False  # treat {"prompt"} as a user's message


def generate(
    config: GenerateConfig,
    *,
    model: str,
    prompts: str,
    output: str,
    cluster: ClusterConfig,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Answer every prompt of the file `prompts` and return the manifest.

    Raises StageError: no such file, a line that is no prompt (named), a prompt longer than the model's context.
    """
    model, output = absolute(model), absolute(output)
    try:
        data = read_bytes(prompts)
    except FileNotFoundError as error:
        raise StageError(str(error)) from None
    require_checkpoint(model)
    records = parse_prompts(data, prompts, chat=config.chat)
    inputs = [
        {"url": model, "id": folder_id(model)},
        {"url": prompts, "id": hashlib.sha256(data).hexdigest()[:16]},
    ]
    folder = open_output(output, stage="generate", config=asdict(config), inputs=inputs)
    if folder.manifest is not None:
        return folder.manifest
    if tracker:
        tracker.log_params(asdict(config))
        tracker.log_input(model, context="model", manifest=find_manifest(model))
        tracker.log_input(prompts, context="prompts")
    blocks = [
        {"name": f"{start:010d}", "start": start, "records": records[start : start + config.batch_rows]}
        for start in range(0, len(records), config.batch_rows)
    ]
    settings = {"model": model, "config": config}
    with storage_errors(output), connect(cluster, join(output, "logs")):
        answers = [
            answer
            for block in map_blocks(
                _Writer,
                blocks,
                settings,
                output=join(output, "blocks"),
                cluster=cluster,
                label="generate",
                progress=progress,
            )
            for answer in block["answers"]
        ]
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        write_bytes(join(output, "generations.jsonl"), lines.encode())
    refused = sum("error" in answer for answer in answers)
    counts = {
        "prompts": len(answers),
        "refused": refused,
        "tokens": sum(answer.get("tokens", 0) for answer in answers),
    }
    run_id = tracker.wait_started() if tracker else None
    manifest = folder.finish(counts, kind="generations", mlflow_run_id=run_id)
    if tracker:
        tracker.log_metrics(counts)
        tracker.log_artifact(join(output, "manifest.json"))
    return manifest


def parse_prompts(data: bytes, url: str, *, chat: bool) -> list[dict[str, Any]]:
    """One record per non-empty line, its prompt under "prompt": text or messages."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise StageError(f"{url} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    records: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        record: Any = {"prompt": line}
        if not url.endswith(".txt"):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise StageError(f"{url}:{number}: not JSON ({error})") from None
        if isinstance(record, dict) and "messages" in record:
            try:
                record["prompt"] = parse_dialogue({"messages": record.pop("messages")})
            except RecordError as error:
                raise StageError(f"{url}:{number}: the messages cannot be used ({error})") from None
        elif not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise StageError(f'{url}:{number}: a prompt line is {{"prompt": text}} or {{"messages": [...]}}')
        elif chat:
            record["prompt"] = [{"role": "user", "content": record["prompt"]}]
        records.append(record)
    if not records:
        raise StageError(f"{url} holds no prompt")
    return records


class _Writer:
    """One actor: the model, loaded once."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.config: GenerateConfig = settings["config"]
        device = training_device()
        self.model, self.tokenizer = llada.load(
            fetch_folder(settings["model"]), device=device, dtype=resolve_precision("auto", device)
        )
        if self.tokenizer is None:
            raise StageError(f"{settings['model']} has no tokenizer")

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        answers: list[dict[str, Any]] = []
        for offset, record in enumerate(block["records"]):
            answers.append({**record, "index": block["start"] + offset})
        try:
            self._complete(answers)
        except ValueError:
            # One prompt that is too long must not cost its neighbours their answers.
            for answer in answers:
                try:
                    self._complete([answer])
                except ValueError as error:
                    answer["error"] = str(error)
        return {"answers": answers}

    def _complete(self, answers: list[dict[str, Any]]) -> None:
        assert self.tokenizer is not None
        seeds = [self.config.seed + answer["index"] for answer in answers]
        prompts = [answer["prompt"] for answer in answers]
        results = complete_texts(self.model, self.tokenizer, prompts, self.config.sampling, seed=seeds)
        for answer, result in zip(answers, results, strict=True):
            answer |= {key: result[key] for key in ("text", "finish_reason", "tokens", "nfe")}


if __name__ == "__main__":
    from pipelines.cli import main

    main(["generate", *sys.argv[1:]])
