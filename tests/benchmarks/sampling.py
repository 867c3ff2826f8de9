"""One prompt at a time: speed and quality of every rule and cache, on the small model of `sampling_model.py`.

    python tests/benchmarks/sampling.py FOLDER [--problems N] [--repeats N] [--threads N] [--results FOLDER] [--plot]

FOLDER is what `sampling_model.py` has made. Each setting answers the same held-out problems, one alone in its canvas; the
settings take turns, in one order and then in the other, and the median of the repeats counts. Reported for each: exact
match by task, tokens before EOS per second of CPU, forwards, token-forwards (tokens fed to the network), tokens per
forward, and the ratio to the vanilla loop (LLaDA's: one token a forward, most confident first, no cache). A cache or rule
that this version of `generate` does not know is left out with a word. A network of 20 M random weights is measured too,
for speed alone, at one and at four tokens a forward.

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
from llada.errors import UserError
from llada.tokenizer import encode_texts

HERE = Path(__file__).resolve().parent
IMAGE = HERE.parents[1] / ".github" / "images" / "sampling.svg"
# By the name that is plotted; "fixed" are so many tokens a forward, the most certain first.
RULES: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "threshold 0.9": {"threshold": 0.9},
    "threshold 0.8": {"threshold": 0.8},
    "threshold 0.7": {"threshold": 0.7},
    "threshold 0.6": {"threshold": 0.6},
    "factor 0.5": {"factor": 0.5},
    "factor 1": {"factor": 1.0},
    "entropy 0.1": {"entropy_bound": 0.1},
    "entropy 0.5": {"entropy_bound": 0.5},
    "fixed 2": {"steps": GEN_LENGTH // 2},
    "fixed 4": {"steps": GEN_LENGTH // 4},
}
CACHES: tuple[str | None, ...] = (None, "prefix", "dual")
FIXED = ("vanilla", "fixed 4")  # what random weights can be measured with: their confidences mean nothing
MARKERS = {"vanilla": "*", "threshold": "o", "factor": "s", "entropy": "D", "fixed": "^"}


@dataclass(frozen=True)
class Setting:
    rule: str
    cache: str | None
    knobs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.rule if self.cache is None else f"{self.rule}, {self.cache}"


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
    model: Any, prompts: Sequence[Sequence[int]], setting: Setting, block_length: int, eos_id: int | None
) -> Pass:
    """`eos_id` None: the whole canvas is the reply."""
    result = Pass()
    for prompt in prompts:
        cpu, wall = time.process_time(), time.perf_counter()
        out = llada.generate(
            model,
            [list(prompt)],
            gen_length=GEN_LENGTH,
            block_length=block_length,
            eos_id=eos_id,
            seed=0,
            cache=setting.cache,  # type: ignore[arg-type]
            **setting.knobs,
        )
        result.cpu_s += time.process_time() - cpu
        result.wall_s += time.perf_counter() - wall
        result.nfe += out.nfe
        result.token_forwards += out.token_forwards
        result.replies.append(before_end(out.sequences[0, len(prompt) :].tolist(), eos_id))
    return result


def usable(
    model: Any, prompts: Sequence[Sequence[int]], settings: list[Setting], block_length: int
) -> tuple[list[Setting], dict[str, str]]:
    """The settings that `generate` knows, and what it says of the others. Warms up on the way."""
    known, skipped = [], {}
    for setting in settings:
        if f"cache {setting.cache}" in skipped:
            continue
        try:
            answer_all(model, prompts[:1], setting, block_length, None)
        except (UserError, TypeError) as error:  # TypeError: there is no such setting at all
            # A cache is tried with the first rule: where that is refused, the cache is.
            name = f"cache {setting.cache}" if setting.rule == settings[0].rule else setting.name
            skipped[name] = str(error)
            print(f"left out: {name}: {error}")
        else:
            known.append(setting)
    return known, skipped


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


def summarise(settings: list[Setting], passes: dict[str, list[Pass]]) -> list[dict[str, Any]]:
    base = passes[settings[0].name]
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
                "speedup": statistics.median(rates)
                / statistics.median(one.tokens / one.cpu_s for one in base),
                # Turn by turn: both halves of a pair have seen the same machine.
                "speedup_range": _range(
                    (one.tokens / one.cpu_s) / (other.tokens / other.cpu_s)
                    for one, other in zip(done, base, strict=True)
                ),
            }
        )
    return rows


def _range(values: Any) -> list[float]:
    values = list(values)
    return [min(values), max(values)]


def quality(
    problems: list[Problem], replies: list[list[int]], tokenizer: Any, vanilla: list[list[int]]
) -> dict[str, Any]:
    """Exact match of all and by task, and the share of replies equal to those of the vanilla loop."""
    hits: dict[str, list[bool]] = {}
    for problem, reply in zip(problems, replies, strict=True):
        hits.setdefault(problem.task, []).append(tokenizer.decode(reply) == problem.answer)
    return {
        "exact_match": sum(map(sum, hits.values())) / len(problems),
        "exact_match_by_task": {task: sum(of) / len(of) for task, of in sorted(hits.items())},
        "same_as_vanilla": sum(a == b for a, b in zip(replies, vanilla, strict=True)) / len(replies),
    }


def measure_trained(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = llada.load(folder / "trained")
    assert tokenizer is not None
    problems = held_out(arguments.problems)
    prompts = encode_texts(tokenizer, [problem.prompt for problem in problems])
    settings = [Setting(rule, cache, knobs) for cache in arguments.caches for rule, knobs in RULES.items()]
    settings, skipped = usable(model, prompts, settings, arguments.block_length)
    passes = take_turns(
        model,
        prompts,
        settings,
        block_length=arguments.block_length,
        eos_id=tokenizer.eos_token_id,
        repeats=arguments.repeats,
    )
    rows = summarise(settings, passes)
    vanilla = passes[settings[0].name][0].replies
    for row, setting in zip(rows, settings, strict=True):
        row |= quality(problems, passes[setting.name][0].replies, tokenizer, vanilla)
    print(
        "setting                     exact  same  tokens/fwd  token-fwds  tokens/CPU s          range   ratio"
    )
    for row in rows:
        low, high = row["tokens_per_cpu_s_range"]
        print(
            f"{row['setting']:26} {row['exact_match']:6.1%} {row['same_as_vanilla']:5.0%} "
            f"{row['tokens_per_forward']:11.2f} {row['token_forwards']:11,} {row['tokens_per_cpu_s']:13.1f} "
            f"{low:7.1f}-{high:<6.1f} {row['speedup']:6.2f}x"
        )
    training = json.loads((folder / "trained" / "training.json").read_text())
    return {
        "parameters": model.config.num_parameters,
        "training": {key: value for key, value in training.items() if key != "settings"},
        "problems": len(problems),
        "prompt_tokens": _range(map(len, prompts)),
        "rows": rows,
        "skipped": skipped,
    }


def measure_random(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Whole canvases of tokens that mean nothing."""
    model, tokenizer = llada.load(folder / "random-20m")
    assert tokenizer is not None
    problems = held_out(max(1, arguments.problems // 20))
    prompts = encode_texts(tokenizer, [problem.prompt for problem in problems])
    settings = [Setting(rule, cache, RULES[rule]) for cache in arguments.caches for rule in FIXED]
    settings, skipped = usable(model, prompts, settings, arguments.block_length)
    passes = take_turns(
        model, prompts, settings, block_length=arguments.block_length, eos_id=None, repeats=arguments.repeats
    )
    rows = summarise(settings, passes)
    for row in rows:
        print(
            f"20 M random: {row['setting']:26} {row['tokens_per_cpu_s']:8.1f} tokens/CPU s {row['speedup']:6.2f}x"
        )
    return {
        "parameters": model.config.num_parameters,
        "problems": len(problems),
        "prompt_tokens": _range(map(len, prompts)),
        "rows": rows,
        "skipped": skipped,
    }


def plot(report: dict[str, Any], target: Path) -> None:
    """Tokens per forward and tokens per second of CPU against exact match: a point for every rule and cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = report["trained"]["rows"]
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
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
                marker=MARKERS.get(row["rule"].split()[0], "X"),
                s=90 if row["rule"] == "vanilla" else 36,
                alpha=0.85,
                linewidths=0,
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
            plt.Line2D(
                [], [], color=colours[cache], marker="o", linestyle="", label=f"cache: {cache or 'none'}"
            )
            for cache in caches
        ),
        *(
            plt.Line2D([], [], color="0.3", marker=marker, linestyle="", label=label)
            for label, marker in _legend(rows).items()
        ),
        plt.Line2D([], [], color="0.6", linestyle=":", label="one point below vanilla"),
    ]
    axes[1].legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
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
    return {f"{kind} {', '.join(values)}".strip(): MARKERS.get(kind, "X") for kind, values in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="made by sampling_model.py")
    parser.add_argument("--problems", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--block-length", type=int, default=16)
    parser.add_argument(
        "--caches", nargs="*", help="names that generate(cache=…) knows; none is always measured"
    )
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
    arguments.caches = CACHES if arguments.caches is None else (None, *arguments.caches)
    if arguments.quick:
        arguments.problems, arguments.repeats = 8, 2
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
