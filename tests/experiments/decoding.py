"""What forwards, blocks, lengths, rules and caches do to quality: LLaDA's tables of its sampling, small.

    python tests/experiments/decoding.py --output FOLDER [--results FOLDER] [--image FILE] [--quick | --scale]

The networks are LLaDA's of `instructions.py`, before and after its fine-tuning; where they are not in FOLDER yet, they are trained.
Before, they go on with texts, after, they answer instructions: the same questions, in known and in new words, of the tasks whose
answers have more than one word. An answer counts when all of it is right, up to its end. Four tables, as the paper has them
(arXiv 2502.09992):
    order     Tables 7 and 8: from left to right and by blocks, on a canvas that ends with the block ("growing") or has all
              masks from the beginning ("fixed"), and the whole at once; a forward for each token
    length    Table 10: canvases of several lengths
    rules     Table 9: the surest tokens or any, by the number of forwards; and all tokens of at least a confidence
    caches    none, prefix and dual, with the forwards of an answer and the tokens fed to the network for it

Each result is a file in --output when it is there; the same command goes on where it was. At the end it writes decoding.json into
--results, the tables into --output/decoding.md and the figure into --image. --quick is to see that it runs, in seconds, --scale
for a GPU; both write into --output.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import instructions
from instructions import BATCH_ROWS, GEN_LENGTH, Experiment, percent
from twins import (
    EOS,
    command_line,
    draw_figure,
    head_of_report,
    keep_settings,
    machine,
    mean_and_error,
    once,
    publish,
    save_figure,
)

from llada.model.hf import load_model
from llada.model.transformer import Transformer
from llada.sampling.generate import generate

SINGLE = ("first", "last")  # tasks whose answers are one word
# Of the networks, and in which form each is asked.
STAGES = {"before": "text", "after": "instruction"}


class Written(NamedTuple):
    """What came of one way of writing, over all questions."""

    right: float
    """Share of the answers."""
    forwards: float
    """Of an answer."""
    fed: float
    """Tokens that the network was fed for an answer."""


@dataclass(frozen=True)
class Setting:
    """How answers are written: a line of a table, and a column in it."""

    line: str
    column: str = ""
    length: int = GEN_LENGTH
    knobs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.line}, {self.column}" if self.column else self.line


TABLES = {
    "order": [
        *(
            Setting(f"{label}, {canvas}", knobs={"block_length": length, **knobs})
            for canvas, knobs in (("growing", {"suffix_window": 0}), ("fixed", {}))
            for length, label in ((1, "left to right"), (2, "blocks of 2"), (4, "blocks of 4"), (6, "blocks of 6"))
        ),
        Setting("the whole"),
    ],
    "length": [
        Setting(line, str(length), length, knobs)
        for line, knobs in (
            ("the whole", {}),
            ("the whole, ends last", {"confidence_eos_eot_inf": True}),
            ("blocks of 4, fixed", {"block_length": 4}),
        )
        for length in (10, 12, 24, 40)
    ],
    "rules": [
        Setting(line, str(tokens), knobs={"steps": GEN_LENGTH // tokens, "remasking": rule})
        for line, rule in (("the surest", "low_confidence"), ("any", "random"))
        for tokens in (1, 2, 4, 12)
    ],
    "caches": [
        Setting(f"{cache}, {line}", knobs={"block_length": 4, **knobs, **({} if cache == "none" else {"cache": cache})})
        for line, knobs in (
            ("a token a forward", {}),
            ("all of at least 0.9", {"threshold": 0.9}),
            ("all of at least 0.6", {"threshold": 0.6}),
        )
        for cache in ("none", "prefix", "dual")
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What is asked of which networks."""

    networks: instructions.Size
    every: int
    """Of the questions of `instructions.py`, one in so many."""


FULL = Size(instructions.FULL, every=3)
QUICK = Size(instructions.QUICK, every=8)
SCALE = Size(instructions.SCALE, every=1)


class Decoding:
    """The questions and the networks; what is done lies in `folder`."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size = folder / "decoding", size
        self.experiment = Experiment(folder, size.networks)
        self.settings = keep_settings(self.folder, {"every": size.every})
        self.asked = [question for question in self.experiment.asked if question.task not in SINGLE][
            :: size.every
        ]

    def run(self, seed: int) -> dict[str, Any]:
        """{"written": {table: {setting: {stage: `Written`}}}, …} with the networks of this seed, which are trained if they are
        not there."""

        def make() -> dict[str, Any]:
            trained = self.experiment.run("LLaDA", seed)
            begun = time.process_time()
            written: dict[str, dict[str, dict[str, Any]]] = {}
            for stage in STAGES:
                network = load_model(self.experiment.network_folder("LLaDA", seed, stage))
                for table, settings in TABLES.items():
                    for setting in settings:
                        found = self.write(stage, network, setting)
                        written.setdefault(table, {}).setdefault(setting.name, {})[stage] = found._asdict()
            cpu_s = time.process_time() - begun
            print(f"decoding         seed {seed}  {cpu_s:.0f} s of CPU", flush=True)
            return {"written": written, "cpu_s": trained["cpu_s"] + cpu_s, "commit": machine()["commit"]}

        return once(self.folder / f"{seed}.json", make)

    def write(self, stage: str, network: Transformer, setting: Setting) -> Written:
        prompts, end_id = self.experiment.forms(self.asked)[STAGES[stage]]
        right = forwards = fed = 0
        for begin in range(0, len(prompts), BATCH_ROWS):
            questions = self.asked[begin : begin + BATCH_ROWS]
            found = generate(
                network,
                prompts[begin : begin + BATCH_ROWS],
                gen_length=setting.length,
                eos_id=EOS,
                eot_id=self.experiment.eot_id,
                seed=0,
                **{"block_length": setting.length, **setting.knobs},
            )
            written = found.sequences[:, -setting.length :].tolist()
            right += self.experiment.are_right(questions, written, end_id).count(True)
            forwards += int(found.reveal_step.max(1).values.sum()) + len(questions)
            fed += found.token_forwards
        return Written(*(number / len(prompts) for number in (right, forwards, fed)))


def summarise(decoding: Decoding, before: dict[str, Any]) -> dict[str, Any]:
    """All that is known, as the result has it."""
    runs = [decoding.run(seed) for seed in decoding.size.networks.pretraining.seeds]
    rows = [
        {
            "table": table,
            "line": setting.line,
            "column": setting.column,
            "length": setting.length,
            "knobs": setting.knobs,
            **{
                key: {stage: [run["written"][table][setting.name][stage][key] for run in runs] for stage in STAGES}
                for key in Written._fields
            },
        }
        for table, settings in TABLES.items()
        for setting in settings
    ]  # fmt: skip
    return {
        **head_of_report(before, runs),
        "settings": {**decoding.settings, "networks": decoding.experiment.settings},
        "parameters": decoding.experiment.twins.network("LLaDA").num_parameters,
        "asked": len(decoding.asked),
        "gen_length": GEN_LENGTH,
        "rows": rows,
    }


def table(report: dict[str, Any]) -> str:
    """Markdown: right answers in percent."""
    rows = {name: [row for row in report["rows"] if row["table"] == name] for name in TABLES}
    lines = [f"| order, a token a forward | {' | '.join(STAGES.values())} |", "|---|---|---|"]
    lines += [
        f"| {row['line']} | {' | '.join(percent(row['right'][stage]) for stage in STAGES)} |"
        for row in rows["order"]
    ]
    for name, head in (("length", "masks"), ("rules", "tokens a forward")):
        columns = list(dict.fromkeys(row["column"] for row in rows[name]))
        lines += ["", f"| {head} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for line in dict.fromkeys(row["line"] for row in rows[name]):
            for stage, kind in STAGES.items():
                shares = [percent(row["right"][stage]) for row in rows[name] if row["line"] == line]
                lines.append(f"| {kind}, {line} | {' | '.join(shares)} |")
    units = ("right", "forwards of an answer", "tokens fed for it")
    lines += ["", f"| instruction, blocks of 4, cache | {' | '.join(units)} |", "|---" * 4 + "|"]
    for row in rows["caches"]:
        forwards, fed = (mean_and_error(row[key]["after"]) for key in ("forwards", "fed"))
        cells = [
            percent(row["right"]["after"]),
            "{:.1f} ± {:.1f}".format(*forwards),
            "{:.0f} ± {:.0f}".format(*fed),
        ]
        lines.append(f"| {row['line']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], target: Path) -> None:
    """Right answers by the length of a block, and by the forwards of an answer."""
    figure, axes = draw_figure(sharey=True)
    left, right = axes

    def draw(
        axis: Any, places: Sequence[float], rows: Sequence[dict[str, Any]], stage: str, **style: Any
    ) -> None:
        means, errors = zip(*(mean_and_error(row["right"][stage]) for row in rows), strict=True)
        axis.errorbar(
            places,
            [100 * mean for mean in means],
            yerr=[100 * error for error in errors],
            markersize=4,
            **style,
        )

    for stage, colour in zip(STAGES, ("tab:orange", "tab:blue"), strict=True):
        rows = [row for row in report["rows"] if row["table"] == "order"]
        for canvas, line in (("growing", "o--"), ("fixed", "o-")):
            some = [row for row in rows if row["line"].endswith(canvas)]
            some += rows[-1:]
            lengths = [row["knobs"].get("block_length", row["length"]) for row in some]
            draw(
                left, lengths, some, stage, fmt=line, color=colour, label=f"{STAGES[stage]}, {canvas} canvas"
            )
        for line, fmt, label in (
            ("the surest", "o-", "the surest"),
            ("any", "x--", "any"),
            ("none, all of at least", "s", "all of at least 0.9, 0.6, by blocks of 4"),
        ):
            some = [
                row
                for row in report["rows"]
                if row["table"] in ("rules", "caches") and row["line"].startswith(line)
            ]
            forwards = [mean_and_error(row["forwards"][stage])[0] for row in some]
            draw(right, forwards, some, stage, fmt=fmt, color=colour, label=f"{STAGES[stage]}, {label}")
    left.set_xscale("log", base=2)
    left.set_xlabel("tokens of a block")
    left.xaxis.set_major_formatter("{x:g}")
    left.set_ylabel("right answers, %")
    # Room for the legends.
    left.set_ylim(0, 1.6 * left.get_ylim()[1])
    right.set_xlabel("forwards of an answer")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper right")
    save_figure(figure, target)


def main(words: Sequence[str] | None = None) -> None:
    arguments = command_line(__doc__).parse_args(words)
    before = machine()
    size = QUICK if arguments.quick else SCALE if arguments.scale else FULL
    decoding = Decoding(arguments.output, size)
    publish(summarise(decoding, before), "decoding", arguments, table, plot)


if __name__ == "__main__":
    main()
