"""What every evaluation task is given: the settings, the checkpoint, the data, and a way to run blocks of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict, TypeVar

from transformers import PreTrainedTokenizerFast

from llada.errors import UserError
from llada.evals.benchmarks.config import BenchmarkConfig
from llada.evals.perplexity.corpora import TextsConfig
from llada.evals.perplexity.judge import GenerativeConfig
from llada.evals.reversal.poems import PoemsConfig
from llada.model.transformer import Transformer
from llada.sampling.config import SamplingConfig
from llada.settings import check_limits, limited
from llada.understanding.config import UnderstandingConfig


class Block(TypedDict):
    """Work for one call; a task adds keys of its own. A JSON object, like the result."""

    name: str


B = TypeVar("B", bound=Block)
R = TypeVar("R")


class MapBlocks(Protocol):
    """Runs blocks wherever it likes, each result stored below the output, in the `folder`, under its block's name and a hash of what
    the block holds."""

    def __call__(
        self, build: Callable[[], Callable[[B], R]], blocks: Sequence[B], *, folder: str
    ) -> Iterator[R]:
        """The results in the order of the blocks. `build`, picklable, makes the function, once per process; a block
        whose result is stored is not run again. So what a result depends on, and `EvaluateConfig` and the inputs do not say, stands
        in its block: requests, which another version of a library may make otherwise, and settings that we publish."""


class OpenModel(Protocol):
    """Loads the checkpoint, on the device of the process it is called in. Picklable."""

    def __call__(self, *, fast: bool) -> tuple[Transformer, PreTrainedTokenizerFast | None]:
        """`fast`: in the precision that the device computes fastest; else as it is stored."""


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure, and how exactly."""

    tasks: tuple[str, ...] = ("perplexity", "samples")
    """Names of llada/evals/tasks.py."""
    split: str = "validation"
    max_rows: int | None = limited(1024, low=1)
    """Rows of the split, from its start; None scores all."""
    num_samples: int = limited(4, low=1)
    """Masks per row."""
    rows_per_block: int = limited(64, low=1)
    document_mask: bool = True
    seed: int = 0
    prompts: tuple[str, ...] = ("",)
    """Completed by the task "samples"."""
    sampling: SamplingConfig = SamplingConfig()
    benchmarks: BenchmarkConfig = BenchmarkConfig()
    texts: TextsConfig = TextsConfig()
    poems: PoemsConfig = PoemsConfig()
    generative: GenerativeConfig = GenerativeConfig()
    understanding: UnderstandingConfig = UnderstandingConfig()

    def __post_init__(self) -> None:
        check_limits(self, "evaluate")


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint under evaluation."""

    config: EvaluateConfig
    model: str
    """Its name in messages: the folder's URL."""
    open_model: OpenModel
    data: str | None
    """A prepared folder, for tasks that need one."""
    output: str
    map_blocks: MapBlocks
    fetch_model: Callable[[], str | Path]
    """A local copy of the checkpoint, for tasks that need more of it than the network."""
    fetch_folder: Callable[[str], str | Path] = Path
    """A local copy of another checkpoint's folder, also in the processes that work on blocks. Picklable."""

    def require_data(self) -> str:
        """The prepared folder. Raises UserError without one."""
        if self.data is None:
            raise UserError(f"{self.model}: this task needs a prepared folder (--data)")
        return self.data


Figures = dict[str, Any]
"""{name: number or JSON value}, as results.json has them."""


def no_files(config: EvaluateConfig) -> tuple[()]:
    """Of a task that reads none."""
    return ()


def no_needs(config: EvaluateConfig) -> None:
    """Of a task that runs by any settings."""


@dataclass(frozen=True)
class Task:
    """One measurement."""

    measure: Callable[[Evaluation], Figures]
    needs_data: bool
    """Whether it reads a prepared folder, which must fit the checkpoint."""
    needs: Callable[[EvaluateConfig], object] = no_needs
    """What must be given. Raises UserError where it is not: before any task has begun."""
    heeds: tuple[str, ...] | None = None
    """The settings of `EvaluateConfig` that it makes use of; None: all."""
    reads: Callable[[EvaluateConfig], Sequence[str | None]] = no_files
    """The files and folders that it reads beside the checkpoint and the data, as far as they are given: their content is part of
    what was evaluated."""
    reports: tuple[str, ...] = ()
    """Files for people that it writes into the output; "/" at the end: all of a folder."""
