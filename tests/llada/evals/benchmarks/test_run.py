"""Benchmarks of lm_eval as a task of ours: its figures, its documents, and what is wrong in one line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llada.errors import UserError
from llada.evals.autoregressive.writing import HEEDED
from llada.evals.benchmarks.build import build_tasks
from llada.evals.benchmarks.catalogue import BENCHMARKS
from llada.evals.benchmarks.config import BenchmarkConfig
from llada.evals.benchmarks.published import find_settings
from llada.evals.benchmarks.run import benchmark_files, needed_benchmarks, run_benchmarks
from llada.evals.evaluation import EvaluateConfig, Evaluation
from llada.evals.harness import open_folder
from llada.evals.requests.scoring import Pair, ScoreConfig, score_pairs
from llada.model.hf import save_model
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.config import SamplingConfig
from llada.sampling.text import load
from llada.tokenizer import encode_texts, save_tokenizer, train_tokenizer

LINES = [{"question": f"What is {n}?", "choices": [f" {n}", f" {n + 1}"], "answer": n % 2} for n in range(5)]
TASK = {
    "task": "toy_questions",
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
}
CHOOSING = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "target_delimiter": ""}
WRITING = {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["?"]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([line["question"] for line in LINES] * 5, 300)
    ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    network = Transformer(ModelConfig(300, 16, 1, 2, 32, max_length=64, **ids))
    network.init_weights(0)
    save_model(network, folder)
    save_tokenizer(tokenizer, folder)
    return str(folder)


@pytest.fixture
def evaluation(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    data = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "toy.jsonl")}}}
    for name, kind in (("choosing", CHOOSING), ("writing", WRITING)):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**TASK, **data, **kind, "task": f"toy_{name}"}))
    bits = {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "bits_per_byte"}]}
    # Its name is also that of a benchmark of the papers: the folder's goes first.
    own = {**TASK, **data, **bits, "task": "piqa", "doc_to_target": "{{question}}"}
    (tmp_path / "own.yaml").write_text(json.dumps(own))
    lost = {**TASK, **CHOOSING, "task": "toy_lost", "dataset_kwargs": {"data_files": {"test": "/none.jsonl"}}}
    (tmp_path / "lost.yaml").write_text(json.dumps(lost))
    broken = {**TASK, **data, **WRITING, "task": "toy_broken", "doc_to_text": "{{nosuch.x.y}}"}
    (tmp_path / "broken.yaml").write_text(json.dumps(broken))
    benchmarks = BenchmarkConfig(
        ("toy_choosing", "toy_writing"),
        task_folder=str(tmp_path),
        limit=4,
        gen_length=8,
        score=ScoreConfig("left_to_right"),
    )

    def map_blocks(
        build: Callable[[], Callable[[Any], Any]], blocks: Sequence[Any], *, folder: str
    ) -> Iterator[Any]:
        return (json.loads(json.dumps(build()(block))) for block in blocks)

    config = EvaluateConfig(benchmarks=benchmarks, sampling=SamplingConfig(block_length=4))
    open_model = partial(open_folder, model, None, None)
    return Evaluation(config, model, open_model, None, str(tmp_path / "out"), map_blocks, lambda: model)


def test_figures_are_those_of_the_answers(evaluation: Evaluation, model: str) -> None:
    figures = run_benchmarks(evaluation)
    network, tokenizer = load(model)
    hits = 0
    for line in LINES[:4]:
        given = encode_texts(tokenizer, [line["question"]])[0]
        wholes = encode_texts(tokenizer, [line["question"] + choice for choice in line["choices"]])
        pairs = [Pair(given, whole[len(given) :]) for whole in wholes]
        scores = [score.log_p for score in score_pairs(network, pairs, ScoreConfig("left_to_right"))]
        hits += scores.index(max(scores)) == line["answer"]
    assert figures["toy_choosing/acc/none"] == hits / 4
    assert 0 <= figures["toy_choosing/acc_stderr/none"] < 1
    assert figures["toy_writing/exact_match/none"] in (0, 0.25, 0.5, 0.75, 1)
    assert figures["requests_cut"] == 0
    lines = Path(evaluation.output, "benchmarks/toy_writing.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc"] for line in lines] == LINES[:4]
    assert all("?" not in json.loads(line)["resps"][0][0] for line in lines)
    for line in lines:
        (request,) = json.loads(line)["requests"]
        assert request["nfe"] == 8
        assert request["seconds"] > 0
        assert not request["is_cut"]
        assert len(request["reveal_step"]) <= 8
    choosing = Path(evaluation.output, "benchmarks/toy_choosing.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["requests"]) for line in choosing] == [2] * 4
    found = figures["benchmarks"]["toy_choosing"]
    assert (found["value"], found["metric"], found["items"], found["requests"]) == (hits / 4, "acc", 4, 8)
    assert found["stderr"] == figures["toy_choosing/acc_stderr/none"]
    assert found["is_share"]
    assert found["settings"]["score"] == {"rule": "left_to_right", "cfg_scale": 0.0}
    written = figures["benchmarks"]["toy_writing"]["settings"]
    assert (written["sampling"]["gen_length"], written["stop"], written["num_fewshot"]) == (8, ["?"], 0)
    table = Path(evaluation.output, "benchmarks.md").read_text()
    assert found["settings_hash"] in table
    assert Path(evaluation.output, "benchmarks.svg").read_bytes().lstrip().startswith(b"<?xml")


def test_an_autoregressive_twin_is_asked_the_same(
    evaluation: Evaluation, tmp_path: Path, save_checkpoint: Callable[..., str]
) -> None:
    twin = save_checkpoint(tmp_path / "twin", causal=True)
    open_model = partial(open_folder, twin, None, None)
    asked = replace(evaluation, model=twin, open_model=open_model, fetch_model=lambda: twin)
    figures = run_benchmarks(asked)
    network, tokenizer = load(twin)
    line = json.loads(Path(asked.output, "benchmarks/toy_choosing.jsonl").read_text().splitlines()[3])
    given = encode_texts(tokenizer, [LINES[3]["question"]])[0]
    for choice, response in zip(LINES[3]["choices"], line["resps"], strict=True):
        ids = encode_texts(tokenizer, [LINES[3]["question"] + choice])[0]
        log_p = (
            network(torch.tensor([ids]))[0, :-1]
            .log_softmax(-1)
            .gather(1, torch.tensor(ids)[1:, None])
            .detach()
        )
        assert float(response[0][0]) == pytest.approx(float(log_p[len(given) - 1 :].sum()), rel=1e-5)
    found = {name: figures["benchmarks"][name]["settings"] for name in ("toy_choosing", "toy_writing")}
    assert found["toy_choosing"]["score"] == {"rule": "exact"}
    assert set(found["toy_writing"]["sampling"]) == {*HEEDED, "seed"}
    guided = replace(asked.config.benchmarks, score=ScoreConfig(cfg_scale=0.5))
    with pytest.raises(UserError, match=r"is autoregressive: guidance \(cfg_scale 0\.5\)"):
        run_benchmarks(replace(asked, config=replace(asked.config, benchmarks=guided)))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "needs --benchmarks.names"),
        pytest.param(
            ("toy_choosin",),
            "lm_eval has no task 'toy_choosin'; did you mean 'toy_choosing'",
            marks=pytest.mark.slow,  # lm_eval's list of its own tasks
        ),
        (("toy_lost",), r"the data of toy_lost cannot be had: .*none\.jsonl"),
        (("toy_broken",), r"^toy_broken cannot be asked and judged: UndefinedError: 'nosuch' is undefined"),
        (("toy_writing",), r"^toy_writing: 5 examples asked for, and it has 4 "),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_one_line(
    evaluation: Evaluation, names: tuple[str, ...], message: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("asked the network")

    benchmarks = replace(evaluation.config.benchmarks, names=names, num_fewshot=5)
    config = replace(evaluation.config, benchmarks=benchmarks)
    with pytest.raises(UserError, match=message) as caught:
        run_benchmarks(replace(evaluation, config=config, map_blocks=never))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ("llada_base", ()),
        ("llada_instruct", ()),
        ("llada_1_5", ("ifeval",)),
        ("llada_base_cfg", ("piqa",)),
        ("illada_base", ("piqa",)),
        ("illada_instruct", ("gsm8k",)),
    ],
)
def test_every_benchmark_of_the_papers_runs_on_real_rows(
    settings: str,
    names: tuple[str, ...],
    data: Path,
    save_checkpoint: Callable[..., str],
    evaluation_of: Callable[[str, EvaluateConfig], Evaluation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the papers' settings, but with short answers: what comes out is noise, and that it comes out is the test. All of them, or
    those in which successors differ."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = names or tuple(find_settings(settings).benchmarks)
    benchmarks = BenchmarkConfig(
        names,
        settings=settings,
        data=str(data),
        allow_code_execution=True,
        limit=1,
        gen_length=4,
        score=ScoreConfig(num_samples=1),
        given=("score.num_samples",),
    )
    model = save_checkpoint(tmp_path / "model", context=128)
    evaluation = evaluation_of(model, EvaluateConfig(tasks=("benchmarks",), benchmarks=benchmarks))
    figures = run_benchmarks(evaluation)
    assert tuple(figures["benchmarks"]) == names
    places = {name: found["place"] for name, found in figures["benchmarks"].items() if found["place"]}
    if settings == "llada_base":  # of which two ask the same documents
        assert places == {name: f"{name}/" for name in ("humaneval_fim", "humaneval_fim_masks")}
    for name, found in figures["benchmarks"].items():
        published = find_settings(settings).benchmarks[name]
        assert 0 <= found["value"] <= 1
        assert figures[f"{name}/{found['metric']}"] == found["value"]
        assert found["results"] == published.results
        assert published.num_fewshot in (None, found["settings"]["num_fewshot"])  # None: not published
        assert published.chat == found["settings"]["chat"]
        assert ("gen_length" in found["given"]) == ("gen_length" in published.sampling)
        lines = [
            json.loads(line)
            for task in found["tasks"]
            for line in Path(evaluation.output, "benchmarks", f"{found['place']}{task}.jsonl")
            .read_text()
            .splitlines()
        ]
        of_filter = [line for line in lines if line["filter"] == found["filter"]]
        assert len(of_filter) == found["items"]
        assert sum(float(line[found["metric"]]) for line in of_filter) / len(of_filter) == pytest.approx(
            found["value"]
        )
        assert all(line["requests"] for line in lines)
    # Five questions before the one that is asked do not fit 128 tokens.
    if "mmlu" in names:
        assert figures["benchmarks"]["mmlu"]["requests_cut"] == figures["benchmarks"]["mmlu"]["requests"]
    table = Path(evaluation.output, "benchmarks.md").read_text()
    assert all(
        f"{figure:.1f} ({source})" in table
        for e in figures["benchmarks"].values()
        for source, figure in e["results"].items()
    )


def test_a_gap_is_as_long_as_its_answer_where_nothing_else_is_said(
    data: Path,
    save_checkpoint: Callable[..., str],
    evaluation_of: Callable[[str, EvaluateConfig], Evaluation],
    tmp_path: Path,
) -> None:
    benchmarks = BenchmarkConfig(("humaneval_fim_masks",), data=str(data), allow_code_execution=True, limit=1)
    model = save_checkpoint(tmp_path / "model", context=160)
    evaluation = evaluation_of(model, EvaluateConfig(benchmarks=benchmarks))
    found = run_benchmarks(evaluation)["benchmarks"]["humaneval_fim_masks"]
    assert found["settings"]["is_infilling"]
    assert found["settings"]["sampling"]["gen_length"] == "as the answer"
    _, tokenizer = load(model)
    for task in found["tasks"]:
        line = json.loads(Path(evaluation.output, "benchmarks", f"{task}.jsonl").read_text().splitlines()[0])
        (masks,) = map(len, encode_texts(tokenizer, [line["doc"]["canonical_solution"]]))
        (request,) = line["requests"]
        # A forward for each of its masks, unless an end of text came first.
        assert 0 < request["nfe"] <= masks
        assert (request["nfe"] == masks) or len(request["reveal_step"]) < masks


def test_the_length_of_another_task_is_not_passed_over() -> None:
    config = EvaluateConfig(
        ("benchmarks",), sampling=SamplingConfig(gen_length=16), benchmarks=BenchmarkConfig(("gsm8k",))
    )
    with pytest.raises(
        UserError, match=r"=16 is the length of the task samples; .* is benchmarks\.gen_length"
    ):
        needed_benchmarks(config)
    assert needed_benchmarks(replace(config, tasks=("benchmarks", "samples"))) == config.benchmarks


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"names": ("hellaswg",)}, r"lm_eval has no task 'hellaswg'; did you mean 'hellaswag'"),
        (
            {"names": ("zqxjkvbz",)},
            rf"no task 'zqxjkvbz'; known: mmlu, .*, {list(BENCHMARKS)[-1]} and [\d,]+ more \(all of lm_eval's: lm_eval ls tasks\)$",
        ),
        (
            {"names": ("gsm8k",), "task_folder": "/none"},
            r"^benchmarks\.task_folder: there is no folder /none$",
        ),
        ({"names": ("gsm8k",), "settings": "llada_bse"}, r"no published settings 'llada_bse'"),
        ({"names": ("toy",), "settings": "llada_base"}, r"llada_base publishes nothing of 'toy'"),
        ({"names": ("gsm8k", "mbpp")}, r"allow it with --benchmarks\.allow-code-execution"),
    ],
    ids=str,
)
def test_what_is_wrong_is_found_before_any_task_begins(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        needed_benchmarks(EvaluateConfig(("benchmarks",), benchmarks=BenchmarkConfig(**asked)))
    assert len(str(caught.value)) < 600


def test_what_a_task_is_belongs_to_what_is_read(tmp_path: Path) -> None:
    """So that an output of an edited task is another one."""
    for name in ("toy.yaml", "words.py", "notes.txt"):
        (tmp_path / name).write_text("task: toy")
    config = EvaluateConfig(("benchmarks",), benchmarks=BenchmarkConfig(("toy",), task_folder=str(tmp_path)))
    assert benchmark_files(config) == [str(tmp_path / "toy.yaml"), str(tmp_path / "words.py")]


def test_without_lm_eval_it_says_what_to_install(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "llada.evals.harness")
    for name in ("lm_eval", "lm_eval.api.instance", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"^lm_eval is not installed: pip install 'llada-pipelines\[eval\]'$"):
        run_benchmarks(evaluation)


def test_choices_are_judged_in_the_order_in_which_they_were_asked(
    model: str, evaluation_of: Callable[[str, EvaluateConfig], Evaluation], tmp_path: Path
) -> None:
    """GPQA's are shuffled, and its generator is that of whoever asked before."""
    rows = [
        {
            "Question": f"{n}?",
            "Correct Answer": f"yes{n}",
            **{f"Incorrect Answer {k}": f"no{k}" for k in (1, 2, 3)},
        }
        for n in range(12)
    ]
    (tmp_path / "gpqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_tasks("gpqa", data=str(tmp_path), num_fewshot=1, allow_code_execution=False)
    benchmarks = BenchmarkConfig(
        ("gpqa",), data=str(tmp_path), num_fewshot=1, score=ScoreConfig(num_samples=1)
    )
    evaluation = evaluation_of(model, EvaluateConfig(benchmarks=benchmarks))
    run_benchmarks(evaluation)
    lines = Path(evaluation.output, "benchmarks/gpqa_main_n_shot.jsonl").read_text().splitlines()
    assert len(lines) == 12
    orders = set()
    for number, line in enumerate(map(json.loads, lines)):
        shown, asked = line["arguments"][0][0].split("Question: ")[1:]
        right = line["doc"]["answer"]
        assert f"{right} yes{number}\n" in asked
        assert line["target"] == right
        assert not shown.startswith(f"{number}?"), "the question is its own example"
        orders.add(right)
    assert len(orders) > 1


def test_a_task_of_the_folder_goes_before_a_benchmark_of_that_name(evaluation: Evaluation) -> None:
    config = replace(evaluation.config, benchmarks=replace(evaluation.config.benchmarks, names=("piqa",)))
    found = run_benchmarks(replace(evaluation, config=config))["benchmarks"]["piqa"]
    assert (found["metric"], found["is_share"], found["items"]) == ("bits_per_byte", False, 4)
    assert f"{found['value']:.4g}" in Path(evaluation.output, "benchmarks.md").read_text()


def test_what_is_wrong_is_found_before_the_first_forward(evaluation: Evaluation, data: Path) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("asked the network")

    def run(**changes: Any) -> None:
        benchmarks = replace(
            evaluation.config.benchmarks, data=str(data), gen_length=None, task_folder=None, **changes
        )
        config = replace(evaluation.config, benchmarks=benchmarks)
        run_benchmarks(replace(evaluation, config=config, map_blocks=never))  # type: ignore[arg-type]

    with pytest.raises(UserError, match=r"humaneval runs the programs .* --benchmarks\.allow-code-execution"):
        run(names=("piqa", "humaneval"))
    with pytest.raises(UserError, match="1024 tokens of an answer leave no room .* in the context of 64"):
        run(names=("piqa", "bbh"), settings="llada_base")
    with pytest.raises(UserError, match="llada_1_5 publishes nothing of 'piqa'"):
        run(names=("piqa",), settings="llada_1_5")
    # A tokenizer without a chat template.
    with pytest.raises(UserError, match="gsm8k is asked as a chat, and .* has no chat template"):
        folder = Path(str(evaluation.fetch_model()))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        bare = Path(evaluation.output).parent / "bare"
        shutil.copytree(folder, bare)
        config.pop("chat_template", None)
        (bare / "tokenizer_config.json").write_text(json.dumps(config))
        (bare / "chat_template.jinja").unlink(missing_ok=True)
        object.__setattr__(evaluation, "fetch_model", lambda: str(bare))
        run(names=("gsm8k",), chat=True, num_fewshot=0)
