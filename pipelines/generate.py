"""The command `generate`: batch inference over files of prompts, by a Ray Data actor pool, each actor with the engine of the
endpoint.

A prompt line is JSON, {"prompt": text} or {"messages": [...]}; in a .txt file it is plain text. A conversation is read as
`prepare` reads it for SFT, with the "system", "context" and "tools" that stand beside it. All fields are copied to the
answer as they are. Answers stand in the order of the prompts, in files of `shard_rows`, those of an input file's end shorter:
    <output>/generations/NUMBER.jsonl    NUMBER: of its first prompt, from 0; written whole
             shards/NUMBER-….json        its figures (what a rerun skips)                       manifest.json  last
An answer adds to the line its "index" and either "text", "finish_reason", "tokens" and "nfe", or "error". Where lines have
fields of these names already, what is added to each line stands in one field, "generated".

Prompt i is seeded with seed + i: shards, batches and the number of actors change nothing. (A GPU computes in bf16, where rounding
depends on the batch and may decide between tokens that are nearly equally likely, but with `batch_invariant`.)
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Literal

from tqdm import tqdm

import llada
from llada.data.left_out import FilesLeftOut, summary
from llada.data.read.listing import list_inputs
from llada.data.read.parts import InputFile
from llada.data.read.prompts import ENDINGS, PromptLine, PromptShard, Record, read_shard, scan_prompts
from llada.errors import UserError
from llada.files import absolute, join, storage_errors, write_bytes
from llada.sampling.config import SamplingConfig
from llada.sampling.engine import DenoiseEngine
from llada.sampling.events import Finished, Text
from llada.sampling.request import GenerateRequest
from llada.sampling.text import prompt_ids
from llada.settings import check_limits, limited
from llada.training.parallel import resolve_precision, training_device
from pipelines.runners.actors import map_blocks, require_checkpoint
from pipelines.runners.progress import Told
from pipelines.stage.artifact import Manifest, fetch_folder
from pipelines.stage.cluster import ClusterConfig, connect
from pipelines.stage.command import Common, Flat, parse, run_command, run_stage
from pipelines.stage.lifecycle import StageInput, begin_stage, finish_stage, folder_input
from pipelines.stage.tracking import Tracker

_log = logging.getLogger(__name__)
_ADDED = ("index", "text", "finish_reason", "tokens", "nfe", "error")
_NESTED = "generated"
# Tokens that one forward is fed: nobody waits for a first text here.
_FORWARD_TOKENS = 4096


@dataclass(frozen=True)
class GenerateConfig:
    """How to answer the prompts."""

    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    batch_rows: int = limited(16, low=1)
    """Prompts denoised together."""
    shard_rows: int = limited(512, low=1)
    """Prompts of a file of answers: the work of an actor at a time, and the most of it that is done again after it was killed."""
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
    """Batch inference over files of prompts."""

    model: str
    """Checkpoint folder."""
    prompts: tuple[str, ...]
    """Files, folders, globs or "@" lists of them: JSON lines with "prompt" or "messages", or .txt with one prompt a line."""
    common: Annotated[Common, Flat]
    config: Annotated[GenerateConfig, Flat] = GenerateConfig()


def main(argv: Sequence[str]) -> None:
    """`llada generate …`"""
    args = parse_words(argv)
    manifest = run_stage(
        "generate", generate, args.common, args.config, model=args.model, prompts=args.prompts
    )
    counts = manifest["counts"]
    answers = join(args.common.output, "generations")
    print(
        f"{answers}: {counts['prompts']:,} answers in {counts['shards']:,} files, {counts['tokens']:,} tokens"
    )
    if counts["refused"]:
        raise UserError(f'{counts["refused"]} prompts were refused; their lines carry an "error"')


def parse_words(argv: Sequence[str]) -> GenerateArgs:
    """The arguments."""
    return parse(GenerateArgs, argv, "generate")


ShardFigures = dict[Literal["prompts", "refused", "tokens"], int]
"""What an actor says of a shard whose answers are written."""


def generate(
    config: GenerateConfig,
    *,
    model: str,
    prompts: Sequence[str],
    output: str,
    cluster: ClusterConfig,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> Manifest:
    """Answer every prompt of the files `prompts` (as `list_inputs` takes them) and return the manifest.

    A line that cannot be answered, as its prompt is longer than the model's context or is none, gets an "error" instead
    of a text. Raises UserError: no such file, none of its lines is a prompt, or many are not (the first one is named).
    """
    model, output = absolute(model), absolute(output)
    files = list_prompts(prompts, output)
    require_checkpoint(model)
    with tqdm(
        total=sum(file.size or 0 for file in files) or None,
        desc="read prompts",
        unit="B",
        unit_scale=True,
        disable=not progress,
        leave=False,
    ) as bar:
        scan = scan_prompts(
            files,
            rows=config.shard_rows,
            chat=config.chat,
            asked=lambda name: name in _ADDED or name.startswith(_NESTED),
            told=bar.update,
        )
    folder = begin_stage(
        "generate",
        output,
        config=asdict(config),
        inputs=[folder_input("model", model), StageInput("prompts", ", ".join(prompts), scan.id)],
        tracker=tracker,
        in_force={**asdict(config), "sampling": config.sampling.in_force()},
    )
    if folder.manifest is not None:
        return folder.manifest
    nested = None
    if any(name in scan.names for name in _ADDED):
        nested = _NESTED
        while nested in scan.names:
            nested += "_"
    counts = Counter[str](shards=len(scan.shards))
    with storage_errors(output), connect(cluster, join(output, "logs")):
        for figures in map_blocks(
            partial(ShardWriter, config, model=model, output=join(output, "generations"), nested=nested),
            scan.shards,
            output=join(output, "shards"),
            cluster=cluster,
            label="generate",
            progress=progress,
            size=lambda shard: shard["rows"],
            unit="prompt",
            tells=True,
        ):
            counts.update(figures)
    return finish_stage(folder, tracker, counts, kind="generations")


def list_prompts(prompts: Sequence[str], output: str) -> list[InputFile]:
    """The files of lines behind `prompts`, in order; what lies in the output is none. Raises UserError when there is none."""
    left_out: FilesLeftOut = {}
    named = ["@" + absolute(url[1:]) if url.startswith("@") else absolute(url) for url in prompts]
    found = list(list_inputs(named, written=[output], left_out=left_out))
    files = [file for file in found if file.url.endswith(ENDINGS)]
    if not files:
        raise UserError(
            f"--prompts: {found[0].url}: prompts are read from {' '.join(ENDINGS)}, not compressed"
        )
    if other := len(found) - len(files):
        _log.warning("--prompts: %d files do not end in %s and are left out", other, " ".join(ENDINGS))
    if left_out:
        _log.warning("--prompts: left out %s", summary(left_out))
    return files


class ShardWriter:
    """One actor: the engine, and what it does with a shard."""

    def __init__(self, config: GenerateConfig, *, model: str, output: str, nested: str | None) -> None:
        """`output`: the folder of the answers. `nested`: the field of a line that holds what is added; None: the line does.

        Raises UserError: settings that this model cannot follow.
        """
        self.config, self.output, self.nested = config, output, nested
        device = training_device()
        # A CPU keeps the file's precision, so that an answer does not depend on its batch.
        dtype = resolve_precision("auto", device) if device.type == "cuda" else None
        network, tokenizer = llada.load(fetch_folder(model), device=device, dtype=dtype)
        if tokenizer is None:
            raise UserError(f"{model} has no tokenizer")
        self.tokenizer = tokenizer
        self.engine = DenoiseEngine(
            network,
            tokenizer,
            max_concurrent=config.batch_rows,
            max_tokens=_FORWARD_TOKENS,
            batch_invariant=config.batch_invariant,
            compiled=config.compiled,
        )
        self.engine.check_request(GenerateRequest((), config.sampling))

    def __call__(self, shard: PromptShard, told: Told) -> ShardFigures:
        """`told` hears of each `batch_rows` of prompts that are done."""
        lines = read_shard(shard, chat=self.config.chat)
        answers = asyncio.run(self._answer_all(lines, shard["first"], told))
        rows = [
            {**line.record, **({self.nested: answer} if self.nested else answer)}
            for line, answer in zip(lines, answers, strict=True)
        ]
        write_bytes(join(self.output, f"{shard['name']}.jsonl"), b"".join(map(_to_line, rows)))
        return {
            "prompts": len(answers),
            "refused": sum("error" in answer for answer in answers),
            "tokens": sum(answer.get("tokens", 0) for answer in answers),
        }

    async def _answer_all(self, lines: Sequence[PromptLine], first: int, told: Told) -> list[Record]:
        # The engine takes `batch_rows` of them; the next ones are ready when one ends.
        room = asyncio.Semaphore(2 * self.config.batch_rows)
        done = 0

        async def answer(number: int, line: PromptLine) -> Record:
            nonlocal done
            async with room:
                try:
                    added = await self._answer(line, self.config.seed + number)
                except UserError as error:
                    added = {"error": str(error)}
            done += 1
            if done % self.config.batch_rows == 0:
                told(done)
            return {"index": number, **added}

        return await asyncio.gather(*(answer(number, line) for number, line in enumerate(lines, start=first)))

    async def _answer(self, line: PromptLine, seed: int) -> Record:
        """What is added to the line. Raises UserError where it cannot be answered."""
        if line.problem is not None:
            return {"error": line.problem}
        ids = prompt_ids(self.tokenizer, line.prompt, tools=line.tools)
        texts: list[str] = []
        async for events in self.engine.batches(
            GenerateRequest(ids, self.config.sampling, seed=seed), pace_s=math.inf
        ):
            texts += [event.text for event in events if isinstance(event, Text)]
            end = events[-1]
        assert isinstance(end, Finished)
        return {
            "text": "".join(texts),
            "finish_reason": end.reason,
            "tokens": end.completion_tokens,
            "nfe": end.nfe,
        }


def _to_line(row: Record) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair in a field that is only copied
        return json.dumps(row).encode() + b"\n"


if __name__ == "__main__":
    run_command("generate")
