"""Whether a network that has only learned to go on with texts follows instructions after fine-tuning: LLaDA, small.

    python tests/experiments/instructions.py --output FOLDER [--results FOLDER] [--image FILE] [--quick | --scale]

Twins (twins.py), LLaDA and an autoregressive one, learn texts that do eight things with four words (instruction_tasks.py): "hot
wet new far , backwards : far new wet hot ." Then they are fine-tuned as `llada sft` does it: dialogues in the chat template, of
which the answers alone are learned, with their ends of text up to the length of the batch. Instructions have other verbs than
texts for what is to be done, in five frames. Asked are words with which no instruction of the training asks for this task, and
verbs in frames that none has. An answer counts when all of it is right, up to its end of turn.
    in a text's way   before: the beginning of a text is gone on with
    before, after     the instruction, before and after the fine-tuning
    without texts     the same fine-tuning of a network that has learned nothing before
LLaDA writes with a forward for each token, the surest first, on a canvas of one length for all answers; the twin from left to right.

Each result is a file in --output when it is there; the same command goes on where it was. At the end it writes instructions.json
into --results, the table into --output/instructions.md and the figure into --image. --quick is to see that it runs, in seconds,
--scale for a GPU; both write into --output. The networks stay in --output/networks; decoding.py goes on with them.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from instruction_tasks import TASKS, Question, asked, instructions, texts, vocabulary
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from twins import (
    EOS,
    TWINS,
    Learning,
    Twins,
    command_line,
    draw_figure,
    head_of_report,
    keep_settings,
    machine,
    mean_and_error,
    once,
    publish,
    save_figure,
    slug,
    train_network,
    write_left_to_right,
    write_packed,
    write_rows,
)

from llada.data.document import Message
from llada.data.tokens.chat import Example, encode_example
from llada.data.tokens.packing import PackedRows, RowLayout
from llada.model.hf import save_model
from llada.model.transformer import Transformer
from llada.sampling.generate import generate
from llada.tokenizer import (
    END_OF_TURN,
    SPECIAL_TOKENS,
    encode_texts,
    ensure_special_tokens,
    render_chat,
)
from llada.training.trainer import TrainResult

TEXT_LENGTH = 20  # of a row: as far as an answer of GEN_LENGTH goes behind a beginning
CONTEXT = 64  # an instruction has 16 tokens, and decoding.py's longest canvas 40 masks behind it
GEN_LENGTH = 12  # masks behind a prompt; the longest answer has ten tokens with its ends
BATCH_ROWS = 64  # of a forward while questions are asked
# What no instruction of the training has with this task: (the words, the verb in this frame).
WAYS = {
    "known words": (False, False),
    "new phrasing": (False, True),
    "new words": (True, False),
    "both new": (True, True),
}
STAGES = ("in a text's way", "before", "after", "without texts")
NAMES = ("LLaDA", "autoregressive")


@dataclass(frozen=True)
class Size:
    """What an experiment costs."""

    pretraining: Learning
    finetuning: Learning
    """Of the same network."""
    asked: int
    """Questions of each task in each of four ways."""


FULL = Size(
    Learning(num_steps=600, batch_rows=64, rates=(0.02,), d_model=96, num_layers=3),
    Learning(num_steps=400, batch_rows=32, rates=(0.01,), d_model=96, num_layers=3),
    asked=12,
)
QUICK = Size(
    Learning(num_steps=4, batch_rows=4, rates=(0.01,), d_model=32, num_layers=1, seeds=(0, 1), validation_rows=4),
    Learning(num_steps=4, batch_rows=4, rates=(0.01,), d_model=32, num_layers=1, seeds=(0, 1), validation_rows=4),
    asked=1,
)  # fmt: skip
SCALE = Size(
    Learning(num_steps=10_000, batch_rows=256, rates=(0.003, 0.01), d_model=256, num_layers=6, precision="auto"),
    Learning(num_steps=2_000, batch_rows=256, rates=(0.003,), d_model=256, num_layers=6, precision="auto"),
    asked=64,
)  # fmt: skip


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word, with the project's special tokens and chat template."""
    ids = {word: number for number, word in enumerate((*SPECIAL_TOKENS, *vocabulary()))}
    backend = Tokenizer(models.WordLevel(ids))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return ensure_special_tokens(PreTrainedTokenizerFast(tokenizer_object=backend))


class Form(NamedTuple):
    """Questions as they are put."""

    prompts: list[list[int]]
    end_id: int
    """What ends an answer."""


class Experiment:
    """The twins, what they learn and what they are asked; what is done lies in `folder`."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size = folder, size
        self.settings = keep_settings(folder, asdict(size))
        self.tokenizer = build_tokenizer()
        self.asked = asked(size.asked)
        self.sentences = once(folder / "data.json", self.write_data)
        self.twins = Twins(folder, folder / "texts", len(self.tokenizer), CONTEXT, size.pretraining)

    def write_data(self) -> dict[str, Any]:
        """The two prepared folders, in which no asked list of words stands for its task; and how much is in them."""
        hidden = {(question.task, question.words) for question in self.asked}

        def drawn(source: Callable[[str], Iterator[Question]], seed: str) -> Iterator[Question]:
            return (question for question in source(seed) if (question.task, question.words) not in hidden)

        def told(split: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
            found = itertools.islice(drawn(texts, split), rows)
            ids = encode_texts(self.tokenizer, [question.text for question in found])
            # All but the beginning is learned.
            return np.array([self.row(text) for text in ids]), np.ones(rows, np.int64)

        def examples(split: str, rows: int) -> PackedRows:
            found = itertools.islice(drawn(instructions, split), rows)
            made = [self.example(question) for question in found]
            return RowLayout(CONTEXT, EOS, kind="sft").rows(made)

        before, after = self.size.pretraining, self.size.finetuning
        rows = {"train": before.rows, "validation": before.validation_rows}
        told_rows = {split: told(split, number) for split, number in rows.items()}
        write_rows(self.folder / "texts", told_rows, len(self.tokenizer))
        rows = {"train": after.rows, "validation": after.validation_rows}
        packed = {split: examples(split, number) for split, number in rows.items()}
        write_packed(self.folder / "instructions", packed, len(self.tokenizer), kind="sft")
        return {"texts": before.rows, "instructions": after.rows}

    @staticmethod
    def row(text: list[int]) -> list[int]:
        """A text as it is learned: an end of text, it, and ends of text."""
        return [EOS, *text] + [EOS] * (TEXT_LENGTH - 1 - len(text))

    def example(self, question: Question) -> Example:
        """An instruction and its answer as they are learned."""
        asking = Message(role="user", content=question.instruction)
        answer = Message(role="assistant", content=question.answer)
        made = encode_example(self.tokenizer, [asking], answer, row_length=CONTEXT)
        assert not isinstance(made, str), made
        return made

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """{"stages": {stage: `judge`}, "finetuning_losses": {stage: nats per token}, …}; the networks before and after stay."""

        def measure(network: Transformer, result: TrainResult) -> dict[str, Any]:
            # The fine-tuning begins from the weights as they are.
            tuned = {
                "after": self.finetune(name, seed, "after", network.state_dict()),
                "without texts": self.finetune(name, seed, "without texts", None),
            }
            networks = {"before": network} | {
                stage: done.model.eval() for stage, done in tuned.items() if done.model
            }
            for stage in ("before", "after"):
                save_model(networks[stage], self.network_folder(name, seed, stage))
            stages = {stage: self.judge(name, found, "instruction") for stage, found in networks.items()}
            return {
                "stages": {"in a text's way": self.judge(name, network, "text"), **stages},
                "finetuning_losses": {stage: done.validation_loss for stage, done in tuned.items()},
            }

        return self.twins.run(name, seed, measure)

    def network_folder(self, name: str, seed: int, stage: str) -> Path:
        return self.folder / "networks" / f"{slug(name)}-{seed}-{stage}"

    def finetune(self, name: str, seed: int, stage: str, start: Mapping[str, Tensor] | None) -> TrainResult:
        """On the instructions, from these weights or from random ones."""
        learning = self.size.finetuning
        checkpoints = self.folder / "checkpoints" / f"{slug(name)}-{seed}-{slug(stage)}"
        result = train_network(
            self.twins.network(name),
            TWINS[name],
            self.folder / "instructions",
            checkpoints,
            rate=learning.rates[0],
            seed=seed,
            num_steps=learning.num_steps,
            batch_rows=learning.batch_rows,
            validation_rows=learning.validation_rows,
            precision=learning.precision,
            initial_state=start,
        )
        shutil.rmtree(checkpoints)
        return result

    def forms(self, questions: Sequence[Question]) -> dict[str, Form]:
        """How the questions are put, as an instruction or in a text's way."""
        dialogues = [[Message(role="user", content=question.instruction)] for question in questions]
        beginnings = encode_texts(self.tokenizer, [question.beginning for question in questions])
        return {
            "instruction": Form(
                [render_chat(self.tokenizer, dialogue) for dialogue in dialogues], self.eot_id
            ),
            "text": Form(
                [[EOS, *beginning] for beginning in beginnings], self.tokenizer.convert_tokens_to_ids(".")
            ),
        }

    @property
    def eot_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(END_OF_TURN))

    def are_right(
        self, questions: Sequence[Question], written: Sequence[Sequence[int]], end_id: int
    ) -> list[bool | None]:
        """Whether what was written to the questions is right, up to the end; None where that does not come."""
        return [
            question.is_right(self.tokenizer.decode(ids[: ids.index(end_id)])) if end_id in ids else None
            for question, ids in zip(questions, written, strict=True)
        ]

    def judge(self, name: str, network: Transformer, form: str) -> dict[str, Any]:
        """The shares of questions that the network answers rightly, of all, by task and by way of asking; and of those
        without an end."""
        prompts, end_id = self.forms(self.asked)[form]
        right = self.are_right(self.asked, write(name, network, prompts), end_id)

        def share(is_wanted: Callable[[Question], bool]) -> float:
            found = [
                one is True for one, question in zip(right, self.asked, strict=True) if is_wanted(question)
            ]
            return sum(found) / len(found)

        return {
            "all": share(lambda _: True),
            "tasks": {task: share(lambda question, task=task: question.task == task) for task in TASKS},
            "ways": {
                way: share(
                    lambda question, kind=kind: (question.is_new_word, question.is_new_phrasing) == kind
                )
                for way, kind in WAYS.items()
            },
            "endless": right.count(None) / len(right),
        }


def write(name: str, network: Transformer, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What the network writes behind each prompt."""
    written: list[list[int]] = [[]] * len(prompts)
    # The twin takes prompts of one length together.
    by_length = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    together = (
        [list(group) for _, group in itertools.groupby(by_length, key=lambda place: len(prompts[place]))]
        if name == "autoregressive"
        else [by_length[begin : begin + BATCH_ROWS] for begin in range(0, len(prompts), BATCH_ROWS)]
    )
    for places in together:
        some = [prompts[place] for place in places]
        if name == "autoregressive":
            found = write_left_to_right(network, torch.tensor(some), GEN_LENGTH)
        else:
            canvas = generate(network, some, gen_length=GEN_LENGTH, block_length=GEN_LENGTH, eos_id=EOS)
            found = canvas.sequences[:, -GEN_LENGTH:]
        for place, ids in zip(places, found.tolist(), strict=True):
            written[place] = ids
    return written


def summarise(experiment: Experiment, before: dict[str, Any]) -> dict[str, Any]:
    """All that is known, as the result has it."""
    rows, done = [], []
    for name in NAMES:
        runs = [experiment.run(name, seed) for seed in experiment.size.pretraining.seeds]
        done += runs
        for stage in STAGES:
            judged = [run["stages"][stage] for run in runs]
            rows.append(
                {
                    "network": name,
                    "stage": stage,
                    **{key: [one[key] for one in judged] for key in ("all", "endless")},
                    **{
                        key: {part: [one[key][part] for one in judged] for part in judged[0][key]}
                        for key in ("tasks", "ways")
                    },
                }
            )
    return {
        **head_of_report(before, done),
        "settings": experiment.settings,
        "parameters": experiment.twins.network("LLaDA").num_parameters,
        "tokens": done[0]["tokens"],
        "sentences": experiment.sentences,
        "asked": len(experiment.asked),
        "rates": {name: experiment.twins.choose_rate(name) for name in NAMES},
        "losses": {
            name: [run["validation_loss"] for run in done[i * len(done) // 2 : (i + 1) * len(done) // 2]]
            for i, name in enumerate(NAMES)
        },
        "rows": rows,
    }


def percent(shares: Sequence[float]) -> str:
    return "{:.1f} ± {:.1f}".format(*(100 * value for value in mean_and_error(shares)))


def shown(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What table and figure show, by its name: of the twin what came of it."""
    return {
        f"{row['network']}, {row['stage']}": row
        for row in report["rows"]
        if row["network"] == "LLaDA" or row["stage"] == "after"
    }


def table(report: dict[str, Any]) -> str:
    """Markdown: right answers in percent, of each task, and of all by what is new in the question."""
    columns = shown(report)
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for key in ("tasks", "ways"):
        for part in report["rows"][0][key]:
            cells = [percent(row[key][part]) for row in columns.values()]
            lines.append(f"| {part} | {' | '.join(cells)} |")
    for label, key in (("**all**", "all"), ("without an end", "endless")):
        lines.append(f"| {label} | {' | '.join(percent(row[key]) for row in columns.values())} |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], target: Path) -> None:
    """A bar for each task, and for what is new in a question, before and after; the seeds on it."""
    figure, axes = draw_figure(width=13, sharey=True)
    rows = {name: row for name, row in shown(report).items() if not name.endswith("in a text's way")}
    colours = ("0.3", "tab:blue", "0.7", "tab:orange")
    for axis, key in zip(axes, ("tasks", "ways"), strict=True):
        parts = list(report["rows"][0][key])
        for number, ((name, row), colour) in enumerate(zip(rows.items(), colours, strict=True)):
            for place, part in enumerate(parts):
                at, shares = place + 0.2 * (number - 1.5), [100 * share for share in row[key][part]]
                label = name if place == 0 else None
                axis.bar(at, np.mean(shares), 0.18, color=colour, alpha=0.6, label=label)
                axis.scatter([at] * len(shares), shares, color="black", s=6, zorder=3)
        axis.set_xticks(range(len(parts)), [part.replace(" ", "\n") for part in parts], fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("instructions answered rightly, %")
    axes[0].set_ylim(0, 115)
    axes[1].legend(fontsize=8, loc="upper right")
    save_figure(figure, target)


def main(words: Sequence[str] | None = None) -> None:
    arguments = command_line(__doc__).parse_args(words)
    before = machine()
    size = QUICK if arguments.quick else SCALE if arguments.scale else FULL
    experiment = Experiment(arguments.output, size)
    for name in NAMES:
        for seed in size.pretraining.seeds:
            experiment.run(name, seed)
    publish(summarise(experiment, before), "instructions", arguments, table, plot)


if __name__ == "__main__":
    main()
