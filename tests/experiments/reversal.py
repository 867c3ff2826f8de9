"""Whether who learned "A is B" knows that B is A: LLaDA and its autoregressive twin.

    python tests/experiments/reversal.py --text FOLDER --output FOLDER [--results FOLDER] [--image FILE] [--quick | --scale]

The facts are those of llada/evals/reversal/facts.py: invented people, each with a name and a description. Of a third of them all
sentences name the person first, of a third the description comes first, and a third is told of in both orders, so that both
orders are known as such. One row in four is a sentence of ordinary text instead, of FOLDER/tinystories.txt. A token is a word;
a row is an end-of-text token, a sentence, and ends of text up to its length. Both twins (twins.py) learn all of it but the
first token, and are given the beginning of a sentence, which they have never seen with these people, up to what is asked for:
the twin goes on from left to right, LLaDA with a forward for each token, the surest first. An answer counts when every word of
it and the full stop are right.

Each result is a file in --output when it is there; the same command goes on where it was. At the end it writes reversal.json into
--results, the table into --output/reversal.md and the figure into --image. --quick is to see that it runs, in seconds, --scale
for a GPU (28.7 M parameters, 1,500 people); both write into --output.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from twins import (
    EOS,
    FIRST_SIGN,
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
    source_of,
    write_left_to_right,
    write_rows,
)

from llada.evals.reversal.facts import FactsConfig, Question, make_facts
from llada.model.transformer import Transformer
from llada.sampling.generate import generate
from llada.training.trainer import TrainResult

NAMES = ("autoregressive", "LLaDA")
# By what is asked for, and whether its people were told of in the order of the question.
KINDS = {
    "description, told so": ("name_first", False),
    "description, told in reverse": ("name_first", True),
    "name, told so": ("description_first", False),
    "name, told in reverse": ("description_first", True),
}
ORDINARY_SHARE = 0.25
FREQUENT_WORDS = 1000  # of the ordinary text; sentences with others are left out


@dataclass(frozen=True)
class Size:
    """What an experiment costs."""

    facts: FactsConfig
    learning: Learning


FULL = Size(
    FactsConfig(name_first=10, description_first=10, both=10),
    Learning(num_steps=2400, batch_rows=32, rates=(0.01, 0.02), d_model=64, num_layers=2),
)
QUICK = Size(
    FactsConfig(name_first=2, description_first=2, both=2, tellings=2),
    Learning(num_steps=8, batch_rows=8, rates=(0.01, 0.02), d_model=32, num_layers=1, seeds=(0, 1), validation_rows=8),
)  # fmt: skip
SCALE = Size(
    FactsConfig(name_first=500, description_first=500, both=500),
    Learning(
        num_steps=20_000, batch_rows=256, rates=(0.003, 0.01), d_model=512, num_layers=8, precision="auto"
    ),
)


def words_of(text: str) -> list[str]:
    return re.findall(r"[\w']+|[^\w\s]", text)


def ordinary_sentences(stories: str, most_words: int) -> list[list[str]]:
    """Sentences of at most so many words, all of which are frequent."""
    sentences = [words_of(sentence) for sentence in re.split(r"(?<=[.!?])\s+|<\|endoftext\|>", stories)]
    counts = Counter(itertools.chain(*sentences))
    frequent = {word for word, _ in counts.most_common(FREQUENT_WORDS)}
    return [
        sentence
        for sentence in sentences
        if 2 < len(sentence) <= most_words and frequent.issuperset(sentence)
    ]


class Experiment:
    """The twins and the questions; what is done lies in `folder`."""

    def __init__(self, text: Path, folder: Path, size: Size) -> None:
        self.size = size
        self.settings = keep_settings(folder, {**asdict(size), "text": source_of(text)})
        self.facts = make_facts(size.facts)
        facts = [words_of(sentence) for sentence in self.facts.texts]
        asked = [words_of(f"{q.prompt} {q.answer}.") for q in self.facts.questions]
        most_words = max(map(len, facts + asked))
        ordinary = ordinary_sentences(text.read_text(encoding="utf-8"), most_words)
        self.words = sorted(set(itertools.chain(*facts, *asked, *ordinary)))
        self.ids = {word: number for number, word in enumerate(self.words, FIRST_SIGN)}
        self.row_length = most_words + 2
        data = folder / "data"

        def write_data() -> dict[str, int]:
            draw = random.Random("ordinary")
            draw.shuffle(ordinary)
            held_out = size.learning.validation_rows // 2
            told = itertools.cycle(facts)
            common = itertools.cycle(ordinary[held_out:])
            train = [
                next(common if (row + 1) * ORDINARY_SHARE % 1 == 0 else told)
                for row in range(size.learning.rows)
            ]
            # By which rates are chosen: how well the facts are known, and text; no question's sentence is among them.
            validation = list(itertools.islice(told, held_out)) + ordinary[:held_out]
            splits = {
                split: (np.array([self.row(sentence) for sentence in rows]), np.ones(len(rows), np.int64))
                for split, rows in (("train", train), ("validation", validation))
            }
            write_rows(data, splits, self.vocab_size)
            return {"facts": len(facts), "ordinary": len(ordinary)}

        self.sentences = once(folder / "data.json", write_data)
        self.twins = Twins(folder, data, self.vocab_size, self.row_length, size.learning)

    @property
    def vocab_size(self) -> int:
        return FIRST_SIGN + len(self.words)

    def row(self, sentence: Sequence[str]) -> list[int]:
        """A sentence as it is learned."""
        ids = [EOS, *(self.ids[word] for word in sentence)]
        return ids + [EOS] * (self.row_length - len(ids))

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """{"right": {kind: share}, "right_of_both": the share among those who were told of in both orders, …}."""

        def measure(network: Transformer, result: TrainResult) -> dict[str, Any]:
            right = [self.answer(name, network, question) for question in self.facts.questions]

            def share(wanted: Sequence[bool]) -> float:
                found = [is_right for is_right, is_wanted in zip(right, wanted, strict=True) if is_wanted]
                return sum(found) / len(found)

            one_order = [len(question.person.told) == 1 for question in self.facts.questions]
            return {
                "right": {
                    kind: share(
                        [
                            is_one and (question.direction, question.is_reverse) == of_kind
                            for is_one, question in zip(one_order, self.facts.questions, strict=True)
                        ]
                    )
                    for kind, of_kind in KINDS.items()
                },
                "right_of_both": share([not is_one for is_one in one_order]),
            }

        return self.twins.run(name, seed, measure)

    def answer(self, name: str, network: Transformer, question: Question) -> bool:
        """Whether the network's is right."""
        prompt = [EOS, *(self.ids[word] for word in words_of(question.prompt))]
        wanted = [self.ids[word] for word in words_of(question.answer + ".")]
        # As far as the rows of the training went.
        length = self.row_length - len(prompt)
        if name == "autoregressive":
            written = write_left_to_right(network, torch.tensor([prompt]), length)[0]
        else:
            found = generate(network, [prompt], gen_length=length, block_length=length)
            written = found.sequences[0, len(prompt) :]
        return written[: len(wanted)].tolist() == wanted


def summarise(experiment: Experiment, before: dict[str, Any]) -> dict[str, Any]:
    """All that is known, as the result has it."""
    rows, done = [], []
    for name in NAMES:
        runs = [experiment.run(name, seed) for seed in experiment.size.learning.seeds]
        done += runs
        rows.append(
            {
                "network": name,
                "right": {kind: [run["right"][kind] for run in runs] for kind in KINDS},
                "right_of_both": [run["right_of_both"] for run in runs],
                "loss": [run["validation_loss"] for run in runs],
                "rate": experiment.twins.choose_rate(name),
            }
        )
    return {
        **head_of_report(before, done),
        "settings": experiment.settings,
        "parameters": experiment.twins.network("LLaDA").num_parameters,
        "tokens": done[0]["tokens"],
        "sentences": experiment.sentences,
        "words": len(experiment.words),
        "rows": rows,
    }


def table(report: dict[str, Any]) -> str:
    """Markdown: right answers in percent."""
    lines = [
        f"| asked for | {' | '.join([*KINDS, 'told in both orders'])} |",
        "|---" * (len(KINDS) + 2) + "|",
    ]
    for row in report["rows"]:
        cells = [
            "{:.1f} ± {:.1f}".format(*(100 * value for value in mean_and_error(shares)))
            for shares in (*row["right"].values(), row["right_of_both"])
        ]
        lines.append(f"| {' | '.join([row['network'], *cells])} |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], target: Path) -> None:
    """A bar for each kind of question and network, the seeds on it."""
    figure, axes = draw_figure(sharey=True)
    for axis, wanted in zip(axes, ("description", "name"), strict=True):
        kinds = [kind for kind in KINDS if kind.startswith(wanted)]
        for offset, row, colour in zip((-0.2, 0.2), report["rows"], ("tab:orange", "tab:blue"), strict=True):
            for place, kind in enumerate(kinds):
                shares = [100 * share for share in row["right"][kind]]
                label = row["network"] if place == 0 else None
                axis.bar(place + offset, np.mean(shares), 0.36, color=colour, alpha=0.6, label=label)
                axis.scatter([place + offset] * len(shares), shares, color="black", s=10, zorder=3)
        axis.set_xticks(range(len(kinds)), [kind.split(", ")[1] for kind in kinds])
        axis.set_title(f"asked for the {wanted}")
        axis.grid(axis="y", alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("right answers, %")
    axes[0].set_ylim(0, 105)
    save_figure(figure, target)


def main(words: Sequence[str] | None = None) -> None:
    arguments = command_line(__doc__, text="tinystories.txt").parse_args(words)
    before = machine()
    size = QUICK if arguments.quick else SCALE if arguments.scale else FULL
    experiment = Experiment(arguments.text, arguments.output, size)
    for seed in size.learning.seeds:
        for name in NAMES:
            experiment.run(name, seed)
    publish(summarise(experiment, before), "reversal", arguments, table, plot)


if __name__ == "__main__":
    main()
