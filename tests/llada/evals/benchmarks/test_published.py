"""Published settings and figures: those of the papers' tables, and what is given by hand goes before them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from llada.errors import UserError
from llada.evals.benchmarks.catalogue import BENCHMARKS
from llada.evals.benchmarks.config import BenchmarkConfig
from llada.evals.benchmarks.published import (
    check_given,
    find_settings,
    given_settings,
    protocol,
    published,
    settings_hash,
)
from llada.evals.requests.scoring import Pair, ScoreConfig, num_forwards
from llada.sampling.config import SamplingConfig

PAPER = ["mmlu", "bbh", "arc_challenge", "hellaswag", "truthfulqa", "winogrande", "piqa", "gsm8k", "math", "gpqa", "humaneval", "humaneval_fim", "mbpp", "cmmlu", "ceval"]  # fmt: skip


def test_the_base_model_has_all_fifteen_benchmarks_of_the_paper() -> None:
    twice = "humaneval_fim_masks"  # the same documents, asked in another way
    names = list(find_settings("llada_base").benchmarks)
    assert [name for name in names if name != twice] == PAPER
    assert twice in names


@pytest.mark.parametrize(
    ("settings", "names", "mean"),
    [
        ("llada_base", "mmlu bbh arc_challenge hellaswag gsm8k math humaneval mbpp", 51.1),
        ("illada_base", "mmlu bbh arc_challenge hellaswag gsm8k math humaneval mbpp", 63.9),
        ("illada_instruct", "mmlu mmlu_pro hellaswag gsm8k math humaneval mbpp", 67.1),
    ],
)
def test_the_figures_have_the_means_that_illadas_paper_gives(settings: str, names: str, mean: float) -> None:
    """A check of the copy: a wrong figure moves the mean."""
    benchmarks = find_settings(settings).benchmarks
    figures = [next(iter(benchmarks[name].results.values())) for name in names.split()]
    assert sum(figures) / len(figures) == pytest.approx(mean, abs=0.051)


def test_the_second_table_is_that_of_the_paper() -> None:
    rows = {
        "mmlu": 65.5,
        "mmlu_pro": 37.0,
        "hellaswag": 74.6,
        "arc_challenge": 88.5,
        "gsm8k": 69.4,
        "math": 31.9,
    }
    rows |= {"gpqa": 33.3, "humaneval": 49.4, "mbpp": 41.0}
    found = find_settings("llada_instruct").benchmarks
    assert {name: entry.results["paper"] for name, entry in found.items()} == rows


def test_every_entry_can_be_run_and_says_where_it_is_from() -> None:
    for name, settings in published().settings.items():
        assert settings.title
        assert settings.of
        for benchmark, entry in find_settings(name).benchmarks.items():
            assert set(entry.results) <= set(published().sources)
            assert all(0 < figure < 100 for figure in entry.results.values())
            how = protocol(benchmark, BenchmarkConfig(settings=name), SamplingConfig())
            assert how.run_as in BENCHMARKS
            gen_length = {} if how.gen_length is None else {"gen_length": how.gen_length}
            SamplingConfig(**how.sampling, **gen_length)
            assert not (entry.score and entry.sampling)
        for figures in settings.others.values():
            assert set(figures) <= set(settings.benchmarks)


def test_guidance_lengths_and_ends_are_those_of_the_scripts() -> None:
    def of(settings: str, name: str) -> object:
        return protocol(name, BenchmarkConfig(settings=settings), SamplingConfig())

    truthful = of("llada_base_cfg", "truthfulqa")
    assert (truthful.score.cfg_scale, truthful.score.num_samples, truthful.num_fewshot) == (2.0, 128, 0)
    assert of("llada_base", "truthfulqa").score.cfg_scale == 0
    code = of("llada_instruct", "humaneval")
    assert code.sampling == {"block_length": 512, "logits_eos_inf": True}
    assert (code.gen_length, code.chat, code.run_as) == (512, True, "humaneval_instruct")
    gpqa = of("llada_1_5", "gpqa")
    assert gpqa.sampling == {"block_length": 16}
    assert of("llada_1_5", "gsm8k").sampling["confidence_eos_eot_inf"] is True
    assert of("illada_base", "piqa").score.rule == "confidence"
    assert of("illada_instruct", "mbpp").sampling == {"block_length": 16, "suffix_window": 0}
    # What the base came out at is no figure of the settings that are built on it.
    assert of("llada_instruct_v1", "mmlu").results == {}
    assert of("llada_instruct_v1", "mmlu").gen_length == 3


def test_a_choice_of_several_tokens_has_the_papers_128_masks_wherever_it_stands() -> None:
    """And one of a single token one forward: the paper's rule is of the choice, not of the benchmark."""
    for name, settings in published().settings.items():
        for benchmark in settings.benchmarks:
            score = protocol(benchmark, BenchmarkConfig(settings=name), SamplingConfig()).score
            assert score.num_samples == 128, (name, benchmark)
    score = protocol("mmlu", BenchmarkConfig(settings="llada_base"), SamplingConfig()).score
    assert [num_forwards(torch.Tensor.float, Pair([1], [2] * n), score) for n in (1, 2)] == [1, 128]


def test_other_numbers_of_examples_than_the_papers_are_told() -> None:
    examples = {
        "gsm8k": 4,
        "mbpp": 4,
        "humaneval_fim": 2,
        "mmlu": 5,
        "bbh": 3,
        "gpqa": 5,
        "winogrande": 5,
        "math": 4,
    }
    for name in ("llada_base", "llada_base_cfg"):
        for benchmark, entry in find_settings(name).benchmarks.items():
            wanted = examples.get(benchmark, entry.num_fewshot)
            assert entry.num_fewshot == wanted or not entry.results or "example" in entry.note, (
                name,
                benchmark,
            )


def test_what_is_given_goes_before_what_is_published() -> None:
    config = BenchmarkConfig(settings="llada_base_cfg", score=ScoreConfig(num_samples=8), num_fewshot=0)
    how = protocol("gpqa", config, SamplingConfig())
    assert (how.score.num_samples, how.score.cfg_scale, how.num_fewshot) == (8, 0.5, 0)
    assert how.given == ("num_fewshot", "score.num_samples")
    # A value that is the default's, too.
    off = dataclasses.replace(config, num_fewshot=None, given=("score.cfg_scale",), score=ScoreConfig())
    how = protocol("gpqa", off, SamplingConfig())
    assert (how.score.cfg_scale, how.given) == (0.0, ("score.cfg_scale",))
    config = BenchmarkConfig(settings="llada_instruct", gen_length=32, given=("chat",))
    how = protocol("gsm8k", config, SamplingConfig(block_length=8, steps=16))
    assert (how.gen_length, how.chat) == (32, False)
    assert how.sampling == {"block_length": 8, "steps": 16, "confidence_eos_eot_inf": True}
    assert how.given == ("chat", "gen_length", "sampling.block_length", "sampling.steps")


@pytest.mark.parametrize(
    ("settings", "name", "score", "sampling", "given"),
    [
        ("llada_instruct", "gsm8k", {}, {"temperature": 0.5}, ("sampling.temperature",)),
        ("llada_instruct", "gsm8k", {}, {"remasking": "random"}, ("sampling.remasking",)),
        ("llada_base", "piqa", {"cfg_scale": 2.0}, {}, ("score.cfg_scale",)),
        # As published, or of what is not done here.
        ("llada_base", "piqa", {"num_samples": 128}, {"steps": 16}, ()),
        ("llada_base", "gsm8k", {"num_samples": 5}, {"block_length": 1024}, ()),
    ],
)
def test_what_is_not_as_published_is_told(
    settings: str, name: str, score: dict[str, Any], sampling: dict[str, Any], given: tuple[str, ...]
) -> None:
    """Also of what the published settings do not name: it was at its default."""
    config = BenchmarkConfig(
        settings=settings, score=ScoreConfig(**score), given=tuple(f"score.{key}" for key in score)
    )
    assert protocol(name, config, SamplingConfig(**sampling)).given == given


def test_without_published_settings_the_given_ones_are_all() -> None:
    how = protocol("gsm8k", BenchmarkConfig(num_fewshot=2), SamplingConfig(block_length=8, gen_length=4))
    assert (how.num_fewshot, how.sampling, how.gen_length, how.results) == (2, {"block_length": 8}, None, {})


def test_a_command_line_tells_what_it_gives() -> None:
    words = [
        "--benchmarks.num-fewshot",
        "3",
        "--benchmarks.score.cfg-scale=0",
        "--sampling.no-logits-eos-inf",
        "--model",
    ]
    words += ["sampling.steps", "--benchmarks.names", "gsm8k", "--benchmarks.no-chat"]
    given = given_settings(words)
    assert given == ("chat", "num_fewshot", "sampling.logits_eos_inf", "score.cfg_scale")
    check_given(given)


@pytest.mark.parametrize(
    ("settings", "name", "message"),
    [
        ("llada_bse", "mmlu", "no published settings 'llada_bse'; did you mean 'llada_base'"),
        ("llada_instruct_block", "math_chat", "publishes nothing of 'math_chat'; did you mean 'math'"),
    ],
)
def test_what_is_not_published_is_named(settings: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        protocol(name, BenchmarkConfig(settings=settings), SamplingConfig())
    with pytest.raises(
        UserError, match=r"'score\.cfg_scal', which is no setting; did you mean 'score\.cfg_scale'"
    ):
        check_given(["score.cfg_scal"])


def test_a_hash_is_that_of_every_setting() -> None:
    settings = {"a": 1, "b": {"c": [1, 2]}}
    assert settings_hash(settings) == settings_hash({"b": {"c": [1, 2]}, "a": 1})
    assert len({settings_hash(settings), settings_hash({**settings, "a": 2}), settings_hash({"a": 1})}) == 3
