"""How often a reply depends on what is denoised beside it, and what `batch_invariant`, which forbids that, costs.

    python tests/benchmarks/batch_invariance.py FOLDER [--problems N] [--repeats N] [--threads N] [--device cuda]

FOLDER is what `sampling_model.py` has made. Held-out problems are answered eight together, and each alone, by precision,
temperature and cache, without and with the switch. Counted are the replies whose tokens differ, and the rows whose logits
differ in any bit when the first forward of each is run alone. With the switch there may be none of either: that is an
error. The cost is the CPU's time (on a GPU the wall's) for the same replies with and without the switch, in turns, the
median of the repeats: of batches, and of one prompt at a time, where the last chunk is mostly filling.

Writes batch_invariance.json, after each part. --quick takes few problems, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from sampling_model import GEN_LENGTH, held_out, machine

import llada
from llada.model.transformer import Transformer
from llada.sampling.canvas import prompt_canvas
from llada.sampling.config import SamplingConfig
from llada.sampling.forward import forward
from llada.sampling.packed import CHUNK
from llada.sampling.sampler import plan
from llada.tokenizer import encode_texts

HERE = Path(__file__).resolve().parent
BATCH = 8
TEMPERATURES = (0.0, 0.7, 1.0)
CACHES = (None, "prefix", "dual")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Prompts = Sequence[Sequence[int]]


def batches(prompts: Prompts, size: int) -> list[tuple[int, Prompts]]:
    """With the number of each one's first prompt."""
    return [(start, prompts[start : start + size]) for start in range(0, len(prompts), size)]


def answer(
    model: Transformer, prompts: Prompts, size: int, config: SamplingConfig, batch_invariant: bool
) -> list[list[int]]:
    """The replies to the prompts, `size` at a time. Prompt i is seeded with i in any case."""
    knobs = {name: getattr(config, name) for name in SamplingConfig.__dataclass_fields__}
    replies: list[list[int]] = []
    for start, some in batches(prompts, size):
        seeds = list(range(start, start + len(some)))
        out = llada.generate(model, some, seed=seeds, batch_invariant=batch_invariant, **knobs)
        replies += out.sequences[:, -config.gen_length :].tolist()
    return replies


def first_logits(
    model: Transformer, prompts: Prompts, size: int, config: SamplingConfig, batch_invariant: bool
) -> list[torch.Tensor]:
    """Of each prompt, those of the first forward: (candidates, V)."""
    mask_id = model.config.mask_token_id
    assert mask_id is not None
    rows: list[torch.Tensor] = []
    for _, some in batches(prompts, size):
        canvas = prompt_canvas([list(prompt) for prompt in some], config, mask_id=mask_id, seed=0)
        step = plan(canvas)
        assert step is not None
        logits = forward(model, canvas, step, batch_invariant=batch_invariant)
        rows += logits.cpu().split(step.where.sum(1).tolist())
    return rows


def count_differences(model: Transformer, prompts: Prompts, block_length: int) -> list[dict[str, Any]]:
    """Raises AssertionError where a reply or its logits depend on the company in spite of the switch."""
    rows = []
    for batch_invariant in (False, True):
        for cache in CACHES:
            for temperature in TEMPERATURES:
                config = SamplingConfig(
                    gen_length=GEN_LENGTH, block_length=block_length, temperature=temperature, cache=cache
                )
                together, alone = (
                    answer(model, prompts, size, config, batch_invariant) for size in (BATCH, 1)
                )
                many, single = (
                    first_logits(model, prompts, size, config, batch_invariant) for size in (BATCH, 1)
                )
                replies = sum(one != other for one, other in zip(together, alone, strict=True))
                logits = sum(not torch.equal(one, other) for one, other in zip(many, single, strict=True))
                assert not batch_invariant or replies == logits == 0, (cache, temperature, replies, logits)
                rows.append(
                    {
                        "batch_invariant": batch_invariant,
                        "cache": cache,
                        "temperature": temperature,
                        "replies": len(prompts),
                        "replies_that_differ": replies,
                        "rows_whose_first_logits_differ": logits,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


def now(model: Transformer) -> float:
    """Seconds of CPU; on a GPU those of the wall, when it has done what it was told."""
    if model.embed.weight.is_cuda:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure_cost(
    model: Transformer, prompts: Prompts, block_length: int, repeats: int
) -> list[dict[str, Any]]:
    rows = []
    for size in (1, BATCH):
        for cache in CACHES:
            config = SamplingConfig(gen_length=GEN_LENGTH, block_length=block_length, cache=cache)
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for batch_invariant in seconds:
                answer(model, prompts[:size], size, config, batch_invariant)  # warm
            for repeat in range(repeats):
                for batch_invariant in (False, True) if repeat % 2 == 0 else (True, False):
                    began = now(model)
                    answer(model, prompts, size, config, batch_invariant)
                    seconds[batch_invariant].append(now(model) - began)
            ratios = [one / other for one, other in zip(seconds[True], seconds[False], strict=True)]
            rows.append(
                {
                    "batch": size,
                    "cache": cache,
                    "seconds_without": statistics.median(seconds[False]),
                    "seconds_with": statistics.median(seconds[True]),
                    "ratio": statistics.median(ratios),
                    "ratio_range": [min(ratios), max(ratios)],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="made by sampling_model.py")
    parser.add_argument("--problems", type=int, default=96)
    parser.add_argument("--timed-problems", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--block-length", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.problems, arguments.timed_problems, arguments.repeats = 16, 8, 2
    torch.set_num_threads(arguments.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    report: dict[str, Any] = {
        "machine": machine(),
        "settings": {
            "gen_length": GEN_LENGTH,
            "block_length": arguments.block_length,
            "batch": BATCH,
            "chunk": CHUNK[arguments.device.partition(":")[0]],
            "device": arguments.device,
            "threads": arguments.threads,
            "repeats": arguments.repeats,
        },
    }
    target = arguments.results / "batch_invariance.json"
    for name, dtype in DTYPES.items():
        model, tokenizer = llada.load(arguments.folder / "trained", device=arguments.device, dtype=dtype)
        large, _ = llada.load(arguments.folder / "random-20m", device=arguments.device, dtype=dtype)
        assert tokenizer is not None
        prompts = encode_texts(tokenizer, [problem.prompt for problem in held_out(arguments.problems)])
        timed = prompts[:: -(-len(prompts) // arguments.timed_problems)]
        figures = report[name] = {}
        figures["differences"] = count_differences(model, prompts, arguments.block_length)
        write(report, target)
        figures["cost"] = measure_cost(model, timed, arguments.block_length, arguments.repeats)
        write(report, target)
        few = timed[: -(-len(timed) // 4)]  # fourteen times the work
        figures["cost_20m"] = measure_cost(large, few, arguments.block_length, arguments.repeats)
        write(report, target)
    print(f"written: {target}")


def write(report: dict[str, Any], target: Path) -> None:
    """After each part, so that a run which is ended has told what it knew; whole or not at all."""
    report["machine"]["load_after"] = os.getloadavg()[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(".part")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    beside.replace(target)


if __name__ == "__main__":
    main()
