"""The command `generate`: batch inference over a file of prompts, by a Ray Data actor pool.

A prompt line is JSON, {"prompt": text} or {"messages": [...]}, other fields being copied to the answer; in a .txt file
it is plain text. Answers stand in the order of the prompts:
    <output>/generations.jsonl     blocks/  finished blocks (what a rerun skips)     manifest.json  last
Prompt i is seeded with seed + i: block size and number of actors change nothing. (A GPU computes in bf16, where rounding
depends on the batch and may decide between tokens that are nearly equally likely; llada/sampling/sampler.py says how often.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, TypedDict

import llada
from llada.data.read.dialogues import RecordError, parse_dialogue
from llada.errors import UserError
from llada.evals.evaluation import Block
from llada.files import absolute, join, read_bytes, write_bytes
from llada.sampling.config import SamplingConfig
from llada.sampling.text import complete_texts
from llada.settings import check_limits, limited
from llada.training.parallel import resolve_precision, training_device
from pipelines.runners.actors import map_blocks, require_checkpoint
from pipelines.stage.artifact import Manifest, fetch_folder, storage_errors
from pipelines.stage.cluster import ClusterConfig, connect
from pipelines.stage.command import Common, Flat, parse, run_command, run_stage
from pipelines.stage.lifecycle import StageInput, begin_stage, finish_stage, folder_input
from pipelines.stage.tracking import Tracker


@dataclass(frozen=True)
class GenerateConfig:
    """How to answer the prompts."""

    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    batch_rows: int = limited(16, low=1)
    """Prompts denoised together."""
    chat: bool = False
    """Treat {"prompt"} as a user's message."""

    def __post_init__(self) -> None:
        check_limits(self, "generate")


@dataclass(frozen=True)
class GenerateArgs:
    """Batch inference over a file of prompts."""

    model: str
    """Checkpoint folder."""
    prompts: str
    """JSON lines with "prompt" or "messages", or .txt with one prompt a line."""
    common: Annotated[Common, Flat]
    config: Annotated[GenerateConfig, Flat] = GenerateConfig()


def main(argv: Sequence[str]) -> None:
    """`llada generate …`"""
    args = parse(GenerateArgs, argv, "generate")
    manifest = run_stage(
        "generate", generate, args.common, args.config, model=args.model, prompts=args.prompts
    )
    counts = manifest["counts"]
    answers = join(args.common.output, "generations.jsonl")
    print(f"{answers}: {counts['prompts']:,} answers, {counts['tokens']:,} tokens")
    if counts["refused"]:
        raise UserError(f'{counts["refused"]} prompts were refused; their lines carry an "error"')


# A line of the prompts: "prompt" (text or messages) and whatever else stands in it. Its answer is the same with "index"
# and either "error" or "text", "finish_reason", "tokens" and "nfe".
Record = dict[str, Any]


class PromptBlock(Block):
    """Prompts that are denoised together. `start` is the first one's number in the file."""

    start: int
    records: list[Record]


class Answers(TypedDict):
    """What an actor makes of a block, as JSON."""

    answers: list[Record]


def generate(
    config: GenerateConfig,
    *,
    model: str,
    prompts: str,
    output: str,
    cluster: ClusterConfig,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> Manifest:
    """Answer every prompt of the file `prompts` and return the manifest.

    A prompt longer than the model's context gets an "error" instead of an answer. Raises UserError: no such file, or a
    line that is no prompt (named).
    """
    model, output = absolute(model), absolute(output)
    try:
        data = read_bytes(prompts)
    except FileNotFoundError as error:
        raise UserError(f"--prompts: {error}") from None
    require_checkpoint(model)
    records = parse_prompts(data, prompts, chat=config.chat)
    prompts_hash = hashlib.sha256(data).hexdigest()[:16]
    folder = begin_stage(
        "generate",
        output,
        config=asdict(config),
        inputs=[folder_input("model", model), StageInput("prompts", prompts, prompts_hash)],
        tracker=tracker,
    )
    if folder.manifest is not None:
        return folder.manifest
    blocks: list[PromptBlock] = [
        {"name": f"{start:010d}", "start": start, "records": records[start : start + config.batch_rows]}
        for start in range(0, len(records), config.batch_rows)
    ]
    with storage_errors(output), connect(cluster, join(output, "logs")):
        answers = [
            answer
            for result in map_blocks(
                partial(_Writer, config, model=model),
                blocks,
                output=join(output, "blocks"),
                cluster=cluster,
                label="generate",
                progress=progress,
            )
            for answer in result["answers"]
        ]
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        write_bytes(join(output, "generations.jsonl"), lines.encode())
    counts = {
        "prompts": len(answers),
        "refused": sum("error" in answer for answer in answers),
        "tokens": sum(answer.get("tokens", 0) for answer in answers),
    }
    return finish_stage(folder, tracker, counts, kind="generations")


def parse_prompts(data: bytes, url: str, *, chat: bool) -> list[Record]:
    """One record per non-empty line, its prompt under "prompt": text or messages."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{url} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    records: list[Record] = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        record: Any = {"prompt": line}
        if not url.endswith(".txt"):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{url}:{number}: not JSON ({error})") from None
        if isinstance(record, dict) and "messages" in record:
            try:
                record["prompt"] = parse_dialogue({"messages": record.pop("messages")})
            except RecordError as error:
                raise UserError(f"{url}:{number}: the messages cannot be used ({error})") from None
        elif not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise UserError(f'{url}:{number}: a prompt line is {{"prompt": text}} or {{"messages": [...]}}')
        elif chat:
            record["prompt"] = [{"role": "user", "content": record["prompt"]}]
        records.append(record)
    if not records:
        raise UserError(f"{url} holds no prompt")
    return records


class _Writer:
    """One actor: the model, loaded once."""

    def __init__(self, config: GenerateConfig, *, model: str) -> None:
        self.config = config
        device = training_device()
        # A CPU keeps the file's precision, so that an answer does not depend on its batch.
        dtype = resolve_precision("auto", device) if device.type == "cuda" else None
        self.model, self.tokenizer = llada.load(fetch_folder(model), device=device, dtype=dtype)
        if self.tokenizer is None:
            raise UserError(f"{model} has no tokenizer")

    def __call__(self, block: PromptBlock) -> Answers:
        answers: list[Record] = [
            {**record, "index": number}
            for number, record in enumerate(block["records"], start=block["start"])
        ]
        try:
            self._complete(answers)
        except UserError:
            # One prompt that is too long must not cost its neighbours their answers.
            for answer in answers:
                try:
                    self._complete([answer])
                except UserError as error:
                    answer["error"] = str(error)
        return {"answers": answers}

    def _complete(self, answers: list[Record]) -> None:
        assert self.tokenizer is not None
        seeds = [self.config.seed + answer["index"] for answer in answers]
        prompts = [answer["prompt"] for answer in answers]
        results = complete_texts(self.model, self.tokenizer, prompts, self.config.sampling, seed=seeds)
        for answer, result in zip(answers, results, strict=True):
            answer |= {key: result[key] for key in ("text", "finish_reason", "tokens", "nfe")}


if __name__ == "__main__":
    run_command("generate")
