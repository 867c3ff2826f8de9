"""The reversal task of LLaDA (arXiv 2502.09992, Section 3.3; `eval_reverse.py`): the line after one of a famous poem, and the line
before it.

The paper speaks of 496 pairs, its file has 469.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from llada.evals.local_rows import field_of, read_rows
from llada.sampling.config import SamplingConfig
from llada.settings import check_limits, limited, require

Direction = Literal["forward", "reversal"]

# As published: 28 tokens, one at a step, greedy, EOS never written.
SAMPLING = SamplingConfig(gen_length=28, steps=28, block_length=28, temperature=0.0, logits_eos_inf=True)
ASKED: dict[Direction, str] = {
    "forward": "{line}的下一句是什么？ 直接输出句子即可。",
    "reversal": "{line}的上一句是什么？ 直接输出句子即可。",
}


# Per cent of right answers, of the paper's third version. Its first has 48.8 and 42.4 for LLaDA.
PUBLISHED: dict[tuple[str, Direction], float] = {
    ("LLaDA-8B-Instruct", "forward"): 51.8,
    ("LLaDA-8B-Instruct", "reversal"): 45.6,
    ("GPT-4o-2024-08-06", "forward"): 82.7,
    ("GPT-4o-2024-08-06", "reversal"): 34.3,
    ("Qwen2.5-7B-Instruct", "forward"): 75.9,
    ("Qwen2.5-7B-Instruct", "reversal"): 38.0,
}


@dataclass(frozen=True)
class PoemsConfig:
    """The poems of the task "reversal"."""

    data: str | None = None
    """JSON lines, or a list in a .json file such as LLaDA's poem_data.json, of {"first", "second"}."""
    limit: int | None = limited(None, low=1)
    """Pairs, from the first; None: all."""
    chat: bool = True
    """Ask through the chat template, as it was published; without, the question is a plain prompt."""

    def __post_init__(self) -> None:
        check_limits(self, "poems")


class PoemQuestion(NamedTuple):
    """A line, and the one that is asked for."""

    prompt: str
    gold: str
    direction: Direction


def read_questions(url: str, limit: int | None = None) -> list[PoemQuestion]:
    """Both questions of each pair, the forward ones first. Raises UserError naming the file, and the row without two lines."""
    pairs = []
    for number, row in enumerate(read_rows(url)[:limit], start=1):
        place = f"{url}, row {number}"
        pair = [field_of(row, name, str, place) for name in ("first", "second")]
        require(all(line.strip() for line in pair), f"{place} has an empty line, which any answer would hold")
        pairs.append(pair)
    return [
        *(PoemQuestion(ASKED["forward"].format(line=first), second, "forward") for first, second in pairs),
        *(PoemQuestion(ASKED["reversal"].format(line=second), first, "reversal") for first, second in pairs),
    ]


def is_right(answer: str, gold: str) -> bool:
    """Whether the line stands somewhere in the answer, whatever surrounds it."""
    return gold in answer
