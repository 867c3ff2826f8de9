"""One prompt at a time: speed and quality of every rule and cache, on the small model of `sampling_model.py`.

    python tests/benchmarks/sampling.py FOLDER [--problems N] [--timed N] [--repeats N] [--threads N] [--results FOLDER] [--plot]

FOLDER is what `sampling_model.py` has made. Each setting answers the same held-out problems. Quality (exact match, also by
task) is that of all of them, in batches, which change no text. Speed is that of the first `--timed` ones, one alone in its
canvas; the settings take turns, in one order and then in the other, and the median of the repeats counts: tokens before
EOS per second of CPU, forwards, token-forwards (tokens fed to the network), tokens per forward.

Two settings are what others do, and the others are measured against them:
    LLaDA       its own loop: one token a forward, the most confident first, no cache
    Fast-dLLM   dual cache, threshold 0.9, blocks of 16
Both fill the whole canvas, what stands behind EOS too; tests/llada/sampling/test_golden_sampler.py holds our loop to the
tokens and forwards of both originals. All other settings end a reply at its EOS. A network of 20 M random weights is measured
too, for speed alone, at one and at four tokens a forward.

Writes sampling.json. --plot draws speed against quality from that file into .github/images/sampling.svg and measures
nothing. --quick takes few problems, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from sampling_model import GEN_LENGTH, Problem, held_out, machine

import llada
from llada.tokenizer import encode_texts

HERE = Path(__file__).resolve().parent
BATCH = 16  # rows, where quality alone is wanted
IMAGE = HERE.parents[1] / ".github" / "images" / "sampling.svg"
# By the name that is plotted; "fixed" are so many tokens a forward, the most certain first.
RULES: dict[str, dict[str, Any]] = {
    "fixed 1": {},
    "fixed 2": {"steps": GEN_LENGTH // 2},
    "fixed 4": {"steps": GEN_LENGTH // 4},
    "fixed 8": {"steps": GEN_LENGTH // 8},
    "threshold 0.9": {"threshold": 0.9},
    "threshold 0.7": {"threshold": 0.7},
    "factor 0.5": {"factor": 0.5},
    "factor 1": {"factor": 1.0},
    "entropy 0.1": {"entropy_bound": 0.1},
    "entropy 0.5": {"entropy_bound": 0.5},
    "error 0.1": {"error_bound": 0.1},
    "error 0.3": {"error_bound": 0.3},
    "error 0.6": {"error_bound": 0.6},
    "leap 0.7": {"leap_threshold": 0.7},
    "margin": {"remasking": "margin"},
    "random": {"remasking": "random"},
    "ancestral": {"remasking": "ancestral"},
    "ancestral in 6": {"remasking": "ancestral", "steps": 6},
    "stratified in 6": {"remasking": "ancestral", "steps": 6, "stratified": True},
    "first_hitting": {"remasking": "first_hitting"},
    "remdm 0.1": {"remdm_cap": 0.1},
    "p2 1": {"p2_eta": 1.0},
}
# By the name that is plotted; with a cache, the rules that a user would choose.
CACHES: dict[str, dict[str, Any]] = {
    "none": {},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "dual"},
    "dual+refreshed": {"cache": "dual", "refresh_every": 3},
    "vicinity": {"cache": "vicinity", "refresh_every": 3},
    "interval": {"cache": "interval", "prompt_interval": 6, "response_interval": 2},
    "shared": {"shared_depth": 0.25},
    "window": {"suffix_window": 16},
    "growing": {"suffix_window": 0},
    "dual+growing": {"cache": "dual", "suffix_window": 0},
}
CACHED_RULES = ("fixed 1", "threshold 0.9", "threshold 0.7", "factor 1", "error 0.3")
FIXED = ("fixed 1", "fixed 4")  # what random weights can be measured with: their confidences mean nothing
MARKERS = {
    "LLaDA": "*", "Fast-dLLM": "*", "fixed": "^", "threshold": "o", "factor": "s", "entropy": "D", "error": "P", "leap": "v",
    "margin": "<", "random": "x", "ancestral": "+", "stratified": "4", "first_hitting": "1", "remdm": "2", "p2": "3",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    rule: str
    cache: str
    knobs: dict[str, Any]
    ends: bool = True
    """Is a reply ended at its EOS?"""

    @property
    def name(self) -> str:
        return self.rule if self.cache == "none" else f"{self.rule}, {self.cache}"


LLADA = Setting("LLaDA", "none", {}, ends=False)
FAST_DLLM = Setting("Fast-dLLM", "dual", {"cache": "dual", "threshold": 0.9}, ends=False)


def build_settings(caches: Sequence[str], rules: Sequence[str], ends: bool = True) -> list[Setting]:
    return [
        Setting(rule, cache, {**RULES[rule], **CACHES[cache]}, ends)
        for cache in caches
        for rule in rules
        if cache == "none" or rule in CACHED_RULES or not ends
    ]


@dataclass
class Pass:
    """One walk of a setting over all problems."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    nfe: int = 0
    token_forwards: int = 0
    replies: list[list[int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.replies))


def before_end(row: Sequence[int], eos_id: int | None) -> list[int]:
    ids = list(row)
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def answer_all(
    model: Any,
    prompts: Sequence[Sequence[int]],
    setting: Setting,
    block_length: int,
    eos_id: int | None,
    batch: int = 1,
) -> Pass:
    """`eos_id` None: the whole canvas is the reply."""
    result = Pass()
    for begin in range(0, len(prompts), batch):
        together = [list(prompt) for prompt in prompts[begin : begin + batch]]
        cpu, wall = time.process_time(), time.perf_counter()
        out = llada.generate(
            model,
            together,
            gen_length=GEN_LENGTH,
            block_length=block_length,
            eos_id=eos_id if setting.ends else None,
            seed=[0] * len(together),
            **setting.knobs,
        )
        result.cpu_s += time.process_time() - cpu
        result.wall_s += time.perf_counter() - wall
        result.nfe += out.nfe
        result.token_forwards += out.token_forwards
        result.replies += [before_end(row, eos_id) for row in out.sequences[:, -GEN_LENGTH:].tolist()]
    return result


def take_turns(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: list[Setting],
    *,
    block_length: int,
    eos_id: int | None,
    repeats: int,
) -> dict[str, list[Pass]]:
    """Every setting `repeats` times over all prompts, in alternating order."""
    passes: dict[str, list[Pass]] = {setting.name: [] for setting in settings}
    for setting in settings:  # warm
        answer_all(model, prompts[:1], setting, block_length, eos_id)
    for repeat in range(repeats):
        for setting in settings if repeat % 2 == 0 else settings[::-1]:
            done = answer_all(model, prompts, setting, block_length, eos_id)
            earlier = passes[setting.name]
            if earlier and earlier[0].replies != done.replies:
                raise AssertionError(f"{setting.name}: the same prompts got other texts in repeat {repeat}")
            earlier.append(done)
            print(
                f"  {repeat + 1}/{repeats} {setting.name:26} {done.tokens / done.cpu_s:8.1f} tokens/CPU s",
                flush=True,
            )
    return passes


def summarise(
    settings: list[Setting], passes: dict[str, list[Pass]], bases: dict[str, Setting]
) -> list[dict[str, Any]]:
    rows = []
    for setting in settings:
        done = passes[setting.name]
        rates = [one.tokens / one.cpu_s for one in done]
        first = done[0]
        rows.append(
            {
                "setting": setting.name,
                "rule": setting.rule,
                "cache": setting.cache,
                "knobs": setting.knobs,
                "tokens": first.tokens,
                "nfe": first.nfe,
                "token_forwards": first.token_forwards,
                "tokens_per_forward": first.tokens / first.nfe,
                "tokens_per_cpu_s": statistics.median(rates),
                "tokens_per_cpu_s_range": [min(rates), max(rates)],
                "tokens_per_wall_s": statistics.median(one.tokens / one.wall_s for one in done),
                **{name: _speedup(done, passes[base.name]) for name, base in bases.items()},
            }
        )
    return rows


def _speedup(passes: list[Pass], base: list[Pass]) -> dict[str, Any]:
    """Turn by turn: both halves of a pair have seen the same machine."""
    ratios = [(a.tokens / a.cpu_s) / (b.tokens / b.cpu_s) for a, b in zip(passes, base, strict=True)]
    return {"median": statistics.median(ratios), "range": _range(ratios)}


def _range(values: Any) -> list[float]:
    values = list(values)
    return [min(values), max(values)]


def quality(
    problems: list[Problem], replies: list[list[int]], tokenizer: Any, llada_replies: list[list[int]]
) -> dict[str, Any]:
    """Exact match of all and by task, and the share of replies equal to those of LLaDA's loop."""
    hits: dict[str, list[bool]] = {}
    for problem, reply in zip(problems, replies, strict=True):
        hits.setdefault(problem.task, []).append(tokenizer.decode(reply) == problem.answer)
    return {
        "exact_match": sum(map(sum, hits.values())) / len(problems),
        "exact_match_by_task": {task: sum(of) / len(of) for task, of in sorted(hits.items())},
        "same_as_llada": sum(a == b for a, b in zip(replies, llada_replies, strict=True)) / len(replies),
    }


def measure_trained(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = llada.load(folder / "trained")
    assert tokenizer is not None
    problems = held_out(arguments.problems)
    prompts = encode_texts(tokenizer, [problem.prompt for problem in problems])
    settings = [LLADA, FAST_DLLM, *build_settings(arguments.caches, list(RULES))]
    block_length, eos_id = arguments.block_length, tokenizer.eos_token_id
    replies = {}
    for setting in settings:
        replies[setting.name] = answer_all(model, prompts, setting, block_length, eos_id, BATCH).replies
        print(f"  quality of {setting.name}", flush=True)
    passes = take_turns(
        model,
        prompts[: arguments.timed],
        settings,
        block_length=block_length,
        eos_id=eos_id,
        repeats=arguments.repeats,
    )
    rows = summarise(settings, passes, {"times_llada": LLADA, "times_fast_dllm": FAST_DLLM})
    print(
        "setting                       exact  same  tokens/fwd  token-fwds  tokens/CPU s  x LLaDA  x Fast-dLLM"
    )
    for row in rows:
        own = replies[row["setting"]]
        if own[: arguments.timed] != passes[row["setting"]][0].replies:
            row["differs_in_batch"] = sum(
                a != b for a, b in zip(own, passes[row["setting"]][0].replies, strict=False)
            )
        row |= quality(problems, own, tokenizer, replies[LLADA.name])
        print(
            f"{row['setting']:28} {row['exact_match']:6.1%} {row['same_as_llada']:5.0%} "
            f"{row['tokens_per_forward']:11.2f} {row['token_forwards']:11,} {row['tokens_per_cpu_s']:13.1f} "
            f"{row['times_llada']['median']:8.2f} {row['times_fast_dllm']['median']:12.2f}"
        )
    training = json.loads((folder / "trained" / "training.json").read_text())
    return {
        "parameters": model.config.num_parameters,
        "training": {key: value for key, value in training.items() if key != "settings"},
        "problems": len(problems),
        "timed": arguments.timed,
        "prompt_tokens": _range(map(len, prompts)),
        "rows": rows,
    }


def measure_random(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Whole canvases of tokens that mean nothing."""
    model, tokenizer = llada.load(folder / "random-20m")
    assert tokenizer is not None
    problems = held_out(max(1, arguments.timed // 40))
    prompts = encode_texts(tokenizer, [problem.prompt for problem in problems])
    settings = build_settings(arguments.caches, FIXED, ends=False)
    passes = take_turns(
        model, prompts, settings, block_length=arguments.block_length, eos_id=None, repeats=arguments.repeats
    )
    rows = summarise(settings, passes, {"times_llada": settings[0]})
    for row in rows:
        print(
            f"20 M random: {row['setting']:26} {row['tokens_per_cpu_s']:8.1f} tokens/CPU s "
            f"{row['times_llada']['median']:6.2f}x"
        )
    return {
        "parameters": model.config.num_parameters,
        "problems": len(problems),
        "prompt_tokens": _range(map(len, prompts)),
        "rows": rows,
    }


def plot(report: dict[str, Any], target: Path) -> None:
    """Tokens per forward and tokens per second of CPU against exact match: a point for every rule and cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = report["trained"]["rows"]
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    colours = dict(zip(caches, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for axis, key, label in (
        (axes[0], "tokens_per_forward", "tokens per forward"),
        (axes[1], "tokens_per_cpu_s", "tokens per second of CPU"),
    ):
        for row in rows:
            axis.scatter(
                row[key],
                100 * row["exact_match"],
                color=colours[row["cache"]],
                marker=MARKERS[row["rule"].split()[0]],
                s=110 if row["rule"] in ("LLaDA", "Fast-dLLM") else 36,
                alpha=0.85,
                linewidths=1,
            )
        for kind, cache in dict.fromkeys((row["rule"].split()[0], row["cache"]) for row in rows):
            curve = [row for row in rows if row["cache"] == cache and row["rule"].split()[0] == kind]
            curve.sort(key=lambda row: row[key])
            axis.plot(
                [row[key] for row in curve],
                [100 * row["exact_match"] for row in curve],
                color=colours[cache],
                linewidth=0.7,
                alpha=0.5,
            )
        axis.axhline(100 * rows[0]["exact_match"] - 1, color="0.6", linewidth=0.8, linestyle=":")
        axis.set_xlabel(label)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("exact match, %")
    handles = [
        *(
            plt.Line2D([], [], color=colours[cache], marker="o", linestyle="", label=f"cache: {cache}")
            for cache in caches
        ),
        *(
            plt.Line2D([], [], color="0.3", marker=marker, linestyle="", label=label)
            for label, marker in _legend(rows).items()
        ),
        plt.Line2D([], [], color="0.6", linestyle=":", label="one point below LLaDA"),
    ]
    axes[1].legend(handles=handles, fontsize=7.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    target.parent.mkdir(parents=True, exist_ok=True)
    # No date and fixed ids, so that the same figures give the same file.
    plt.rcParams["svg.hashsalt"] = "sampling"
    figure.savefig(target, metadata={"Date": None})
    print(f"drawn: {target}, {target.stat().st_size / 1024:.0f} KiB")


def _legend(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Label -> marker: a rule of several settings once, with all of them."""
    kinds: dict[str, list[str]] = {}
    for row in rows:
        kind, _, value = row["rule"].partition(" ")
        values = kinds.setdefault(kind, [])
        if value not in values:
            values.append(value)
    return {f"{kind} {', '.join(values)}".strip(): MARKERS[kind] for kind, values in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="made by sampling_model.py")
    parser.add_argument("--problems", type=int, default=240)
    parser.add_argument("--timed", type=int, default=64, help="of the problems")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--block-length", type=int, default=16)
    parser.add_argument("--caches", nargs="+", choices=list(CACHES), default=list(CACHES))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--plot", action="store_true", help="only draw what was measured")
    parser.add_argument("--image", type=Path, default=IMAGE)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    target = arguments.results / "sampling.json"
    if arguments.plot:
        plot(json.loads(target.read_text()), arguments.image)
        return
    if arguments.folder is None:
        parser.error("name the folder that sampling_model.py has made")
    if arguments.quick:
        arguments.problems, arguments.timed, arguments.repeats = 16, 4, 2
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {
        "machine": machine(),
        "settings": {
            "gen_length": GEN_LENGTH,
            "block_length": arguments.block_length,
            "threads": arguments.threads,
            "repeats": arguments.repeats,
            "dtype": "float32",
            "batch": 1,
        },
        "trained": measure_trained(arguments.folder, arguments),
        "random_20m": measure_random(arguments.folder, arguments),
    }
    report["machine"]["load_after"] = os.getloadavg()[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
