"""The settings of the evaluation task "benchmarks"."""

from __future__ import annotations

from dataclasses import dataclass

from llada.evals.requests.scoring import ScoreConfig
from llada.settings import check_limits, limited


@dataclass(frozen=True)
class BenchmarkConfig:
    """Benchmarks of the papers and tasks of lm_eval (the extra "eval"), their answers written with `sampling`."""

    names: tuple[str, ...] = ()
    """The papers' benchmarks, as benchmarks/catalogue.py has them (mmlu, gsm8k, humaneval, …), and tasks and groups, as `lm_eval
    ls tasks` has them."""
    settings: str | None = None
    """Published settings, as benchmarks/published.yaml has them (llada_base, llada_instruct, llada_1_5, illada_base, …): examples,
    guidance, lengths, blocks, ends of text. What is given beside them goes before them."""
    data: str | None = None
    """A folder with the papers' benchmarks as <name>.jsonl and <name>.fewshot.jsonl; None: the hub's data sets."""
    allow_code_execution: bool = False
    """Run the programs that the model writes (HumanEval, MBPP), in a sandbox: see benchmarks/jail.py."""
    task_folder: str | None = None
    """A folder with further task files of lm_eval."""
    num_fewshot: int | None = limited(None, low=0)
    """Examples in each prompt; None: as many as the published settings or the task say."""
    limit: int | None = limited(None, low=1)
    """Documents of each task, from its start; None: all."""
    chat: bool = False
    """Prompts through the chat template."""
    gen_length: int | None = limited(None, low=1)
    """Masks behind each prompt; None: as many as the published settings or the task say. (`sampling` has its own for the task
    "samples".)"""
    score: ScoreConfig = ScoreConfig()
    given: tuple[str, ...] = ()
    """Settings that go before published ones though they have the value of their default, such as score.cfg_scale; the command
    line names here what it is given."""

    def __post_init__(self) -> None:
        check_limits(self, "benchmarks")
