"""The command `generate`: batch inference over a file of prompts, by a Ray Data actor pool.

A prompt line is JSON, {"prompt": text} or {"messages": [...]}; in a .txt file it is plain text. A conversation is read as
`prepare` reads it for SFT, with the "system", "context" and "tools" that stand beside it. All fields are copied to the
answer. Answers stand in the order of the prompts:
    <output>/generations.jsonl     blocks/  finished blocks (what a rerun skips)     manifest.json  last
An answer adds to the line its "index" and either "text", "finish_reason", "tokens" and "nfe", or "error". Where lines have
fields of these names already, what is added to each line of the file stands in one field, "generated".

Prompt i is seeded with seed + i: block size and number of actors change nothing. (A GPU computes in bf16, where rounding
depends on the batch and may decide between tokens that are nearly equally likely, but with `batch_invariant`.)
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple, TypedDict

import llada
from llada.data.document import text_problem
from llada.data.read.dialogues import FIELDS, RecordError, parse_dialogue
from llada.errors import UserError
from llada.evals.evaluation import Block
from llada.files import absolute, join, read_bytes, storage_errors, write_bytes
from llada.sampling.compiled import compile_network
from llada.sampling.completions import complete_texts
from llada.sampling.config import SamplingConfig
from llada.settings import check_limits, limited
from llada.training.parallel import resolve_precision, training_device
from pipelines.runners.actors import map_blocks, require_checkpoint
from pipelines.stage.artifact import Manifest, fetch_folder
from pipelines.stage.cluster import ClusterConfig, connect
from pipelines.stage.command import Common, Flat, parse, run_command, run_stage
from pipelines.stage.lifecycle import StageInput, begin_stage, finish_stage, folder_input
from pipelines.stage.tracking import Tracker

_log = logging.getLogger(__name__)
_ADDED = ("index", "text", "finish_reason", "tokens", "nfe", "error")
_BESIDE = (*FIELDS["system"], *FIELDS["context"], *FIELDS["tools"])
_MOST_BAD = 0.1  # of the lines: with more, the file is something else


@dataclass(frozen=True)
class GenerateConfig:
    """How to answer the prompts."""

    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    batch_rows: int = limited(16, low=1)
    """Prompts denoised together."""
    chat: bool = False
    """Treat {"prompt"} as a user's message."""
    batch_invariant: bool = False
    """Also in bf16, and at some cost, an answer does not depend on what is denoised beside it."""
    compiled: bool = False
    """Compile the network first, which takes up to a minute: a forward has fewer kernels then, which is meant for GPUs, while a
    CPU gains little. Needs g++, on a GPU Triton and gcc."""

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
    args = parse_words(argv)
    manifest = run_stage(
        "generate", generate, args.common, args.config, model=args.model, prompts=args.prompts
    )
    counts = manifest["counts"]
    answers = join(args.common.output, "generations.jsonl")
    print(f"{answers}: {counts['prompts']:,} answers, {counts['tokens']:,} tokens")
    if counts["refused"]:
        raise UserError(f'{counts["refused"]} prompts were refused; their lines carry an "error"')


def parse_words(argv: Sequence[str]) -> GenerateArgs:
    """The arguments."""
    return parse(GenerateArgs, argv, "generate")


# A line of the prompts: "prompt" (text or messages) and whatever else stands in it.
Record = dict[str, Any]


class PromptLine(NamedTuple):
    """A line of the file, why it cannot be answered, if so, and what its conversation may call."""

    record: Record
    problem: str | None = None
    tools: Sequence[Any] = ()


class PromptBlock(Block):
    """Prompts that are denoised together, each with its number in the file."""

    numbers: list[int]
    prompts: list[Any]
    tools: list[Sequence[Any]]


class Answers(TypedDict):
    """What an actor makes of a block: for each prompt, what is added to its line."""

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

    A line that cannot be answered, as its prompt is longer than the model's context or is none, gets an "error" instead
    of a text. Raises UserError: no such file, none of its lines is a prompt, or many are not (the first one is named).
    """
    model, output = absolute(model), absolute(output)
    try:
        data = read_bytes(prompts)
    except FileNotFoundError as error:
        raise UserError(f"--prompts: {error}") from None
    require_checkpoint(model)
    lines = parse_prompts(data, prompts, chat=config.chat)
    prompts_hash = hashlib.sha256(data).hexdigest()[:16]
    folder = begin_stage(
        "generate",
        output,
        config=asdict(config),
        inputs=[folder_input("model", model), StageInput("prompts", prompts, prompts_hash)],
        tracker=tracker,
        in_force={**asdict(config), "sampling": config.sampling.in_force()},
    )
    if folder.manifest is not None:
        return folder.manifest
    added: list[Record] = [{"index": number, "error": line.problem} for number, line in enumerate(lines)]
    with storage_errors(output), connect(cluster, join(output, "logs")):
        for result in map_blocks(
            partial(_Writer, config, model=model),
            _blocks(lines, config.batch_rows),
            output=join(output, "blocks"),
            cluster=cluster,
            label="generate",
            progress=progress,
        ):
            for answer in result["answers"]:
                added[answer["index"]] = {name: answer[name] for name in _ADDED if name in answer}
        write_bytes(join(output, "generations.jsonl"), _written(lines, added))
    counts = {
        "prompts": len(added),
        "refused": sum("error" in answer for answer in added),
        "tokens": sum(answer.get("tokens", 0) for answer in added),
    }
    return finish_stage(folder, tracker, counts, kind="generations")


def _blocks(lines: Sequence[PromptLine], rows: int) -> list[PromptBlock]:
    blocks: list[PromptBlock] = []
    for start in range(0, len(lines), rows):
        numbers = [n for n, line in enumerate(lines[start : start + rows], start) if line.problem is None]
        if numbers:
            blocks.append(
                {
                    "name": f"{start:010d}",
                    "numbers": numbers,
                    "prompts": [lines[number].record["prompt"] for number in numbers],
                    "tools": [lines[number].tools for number in numbers],
                }
            )
    return blocks


def _written(lines: Sequence[PromptLine], added: Sequence[Record]) -> bytes:
    """The file of answers. No field of a line is lost: see the beginning of this file."""
    is_nested = any(name in line.record for line in lines for name in _ADDED)
    name = "generated"
    while any(name in line.record for line in lines):
        name += "_"
    out: list[bytes] = []
    for line, answer in zip(lines, added, strict=True):
        row = {**line.record, **({name: answer} if is_nested else answer)}
        try:
            out.append(json.dumps(row, ensure_ascii=False).encode())
        except UnicodeEncodeError:  # half of a surrogate pair in a field that is only copied
            out.append(json.dumps(row).encode())
    return b"".join(line + b"\n" for line in out)


def parse_prompts(data: bytes, url: str, *, chat: bool) -> list[PromptLine]:
    """The non-empty lines, the prompt of each under "prompt": text or messages. Those that are none are logged.

    Raises UserError naming the first of them when they are many, or all.
    """
    lines: list[PromptLine] = []
    # Not splitlines: JSON strings may hold U+2028.
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if line.strip():
            lines.append(
                _parse_line(
                    line.removesuffix(b"\r"), f"{url}:{number}", is_text=url.endswith(".txt"), chat=chat
                )
            )
    problems = [line.problem for line in lines if line.problem is not None]
    if not lines:
        raise UserError(f"{url} holds no prompt")
    if len(problems) > _MOST_BAD * len(lines):
        others = (
            f"; {len(problems) - 1:,} more of {len(lines):,} lines cannot be used either"
            if problems[1:]
            else ""
        )
        raise UserError(problems[0] + others)
    for problem in problems:
        _log.warning("%s; the other lines are answered", problem)
    return lines


def _parse_line(line: bytes, place: str, *, is_text: bool, chat: bool) -> PromptLine:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return PromptLine({}, f"{place} is not UTF-8 text ({error.reason} at byte {error.start} of the line)")
    record: Any = {"prompt": text}
    if not is_text:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            return PromptLine({}, f"{place}: not JSON ({error})")
    if not isinstance(record, dict):
        record = {}
    prompt, messages = record.get("prompt"), record.get("messages")
    if messages is not None and prompt is not None:
        return PromptLine(record, f"{place}: a prompt line holds either a prompt or messages, not both")
    beside = {name: record[name] for name in _BESIDE if record.get(name)}
    if chat and beside and isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    if messages is not None:
        try:
            told = parse_dialogue({"messages": messages, **beside})
        except RecordError as error:
            return PromptLine(record, f"{place}: the messages cannot be used ({error})")
        rest = {name: value for name, value in record.items() if name not in ("messages", "prompt")}
        prompt = [{key: value for key, value in turn.items() if key != "trained"} for turn in told.messages]
        return PromptLine({**rest, "prompt": prompt}, tools=told.tools)
    if not isinstance(prompt, str):
        return PromptLine(record, f'{place}: a prompt line is {{"prompt": text}} or {{"messages": [...]}}')
    if text_problem(prompt) == "not_utf8":
        return PromptLine(record, f"{place}: the prompt holds half of a surrogate pair, which is no text")
    return PromptLine({**record, "prompt": [{"role": "user", "content": prompt}]} if chat else record)


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
        if config.compiled:
            compile_network(self.model)

    def __call__(self, block: PromptBlock) -> Answers:
        numbers, prompts, tools = block["numbers"], block["prompts"], block["tools"]
        try:
            return {"answers": self._complete(numbers, prompts, tools)}
        except UserError:
            # One prompt that is too long must not cost its neighbours their answers.
            answers: list[Record] = []
            for number, prompt, can_call in zip(numbers, prompts, tools, strict=True):
                try:
                    answers += self._complete([number], [prompt], [can_call])
                except UserError as error:
                    answers.append({"index": number, "error": str(error)})
            return {"answers": answers}

    def _complete(self, numbers: list[int], prompts: list[Any], tools: list[Sequence[Any]]) -> list[Record]:
        assert self.tokenizer is not None
        seeds = [self.config.seed + number for number in numbers]
        results = complete_texts(
            self.model,
            self.tokenizer,
            prompts,
            self.config.sampling,
            tools=tools,
            seed=seeds,
            batch_invariant=self.config.batch_invariant,
        )
        return [
            {"index": number, **{key: result[key] for key in ("text", "finish_reason", "tokens", "nfe")}}
            for number, result in zip(numbers, results, strict=True)
        ]


if __name__ == "__main__":
    run_command("generate")
