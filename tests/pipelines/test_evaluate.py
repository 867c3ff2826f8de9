"""`llada evaluate`: its figures equal the plain functions."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import llada
from llada.data.tokens.shards import TokenDataset
from llada.errors import UserError
from llada.evals.benchmarks.config import BenchmarkConfig
from llada.evals.benchmarks.run import run_benchmarks
from llada.evals.evaluation import EvaluateConfig, Evaluation
from llada.evals.perplexity import shards
from llada.evals.perplexity.corpora import TextsConfig
from llada.evals.perplexity.judge import GenerativeConfig
from llada.evals.requests.scoring import ScoreConfig
from llada.evals.reversal.poems import PoemsConfig
from llada.evals.tasks import TASKS
from llada.model.hf import save_model
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.config import SamplingConfig
from llada.tokenizer import save_tokenizer, train_tokenizer
from llada.training.parallel import resolve_precision
from llada.understanding.config import UnderstandingConfig
from pipelines.evaluate import evaluate, main, parse_words, settings_by_task, settings_in_force
from pipelines.stage.cluster import ClusterConfig

pytestmark = pytest.mark.integration


def test_the_bound_equals_the_plain_function(stages, tmp_path):
    config = EvaluateConfig(num_samples=2, rows_per_block=7, document_mask=True, prompts=("The",))
    config = replace(config, sampling=stages.recipe.sampling)
    output = str(tmp_path / "evaluation")
    evaluate(
        config,
        model=stages.pretrained,
        data=stages.data,
        output=output,
        cluster=ClusterConfig(min_replicas=2, max_replicas=2, cpus_per_replica=0.5),
        progress=False,
    )
    results = json.loads(Path(output, "results.json").read_text())
    dataset = TokenDataset(stages.data, "validation")
    rows = dataset.rows(np.arange(len(dataset)))
    # In its precision and its batches: bf16 rounds by both.
    model, _ = llada.load(stages.pretrained, dtype=resolve_precision("auto", torch.device("cpu")))
    bound = llada.perplexity_bound(
        model,
        torch.from_numpy(rows.tokens),
        maskable=torch.from_numpy(rows.maskable),
        segment_ids=torch.from_numpy(rows.segment_ids),
        num_samples=2,
        batch_size=7,
    )
    assert results["nats_per_token"] == pytest.approx(bound.nats_per_token, rel=1e-5)
    assert results["standard_error"] == pytest.approx(bound.standard_error, rel=1e-4)
    assert results["rows"] == len(dataset)
    assert results["settings"]["perplexity"]["rows_per_block"] == 7
    assert results["settings"]["samples"]["prompts"] == ["The"]
    assert results["ratio_to_unigram"] == pytest.approx(
        results["nats_per_token"] / results["unigram_nats_per_token"]
    )
    sample = results["samples"][0]
    assert sample["prompt"] == "The"
    assert "<|" not in sample["text"]


def test_a_block_is_scored_in_forwards_of_a_bounded_size(stages, monkeypatch):
    model, _ = llada.load(stages.pretrained, dtype=torch.float32)
    fed = []
    model.register_forward_pre_hook(lambda _, args: fed.append(args[0].shape))
    config = EvaluateConfig(num_samples=2, document_mask=True)
    score = shards.RowScorer(lambda *, fast: (model, None), config, stages.data, 20)
    whole = score({"name": "", "start": 3, "end": 10})
    length = fed[-1][1]
    monkeypatch.setattr(shards, "FED_TOKENS", 3 * length + 1)
    fed.clear()
    again = score({"name": "", "start": 3, "end": 10})
    assert [rows for rows, _ in fed] == [3, 3, 3, 3, 1, 1]
    torch.testing.assert_close(again["nats"], whole["nats"], rtol=1e-5, atol=1e-4)
    assert again["tokens"] == whole["tokens"]


def test_one_row_with_one_mask_has_no_error(stages, tmp_path):
    config = EvaluateConfig(("perplexity",), max_rows=1, num_samples=1)

    def here(build, blocks, *, folder):
        return map(build(), blocks)

    def open_model(*, fast):
        return llada.load(stages.pretrained, dtype=torch.float32)

    alone = Evaluation(config, "m", open_model, stages.data, str(tmp_path), here, lambda: stages.pretrained)
    figures = shards.measure_perplexity(alone)
    assert figures["rows"] == 1
    assert "standard_error" not in figures


def test_evaluation_refuses_other_data(stages, tmp_path):
    common = {"cluster": stages.cluster, "progress": False, "output": str(tmp_path / "o")}
    with pytest.raises(UserError, match="needs --data"):
        evaluate(EvaluateConfig(), model=stages.pretrained, data=None, **common)
    with pytest.raises(UserError, match="no checkpoint at"):
        evaluate(EvaluateConfig(), model=str(tmp_path / "none"), data=stages.data, **common)


def test_what_a_later_task_needs_is_told_before_the_first_begins(stages, tmp_path):
    config = EvaluateConfig(tasks=("samples", "generative_perplexity"))
    with pytest.raises(UserError, match="needs --generative.judge"):
        evaluate(
            config, model=stages.pretrained, data=None, cluster=stages.cluster, output=str(tmp_path / "o")
        )
    assert not (tmp_path / "o").exists()


def test_in_force_are_the_settings_of_the_chosen_tasks():
    samples = settings_in_force(EvaluateConfig(tasks=("samples",)), [TASKS["samples"]])
    assert set(samples) == {"tasks", "prompts", "sampling", "seed"}
    assert "schedule" not in samples["sampling"]
    bound = settings_in_force(EvaluateConfig(tasks=("perplexity",)), [TASKS["perplexity"]])
    assert "sampling" not in bound
    assert bound["num_samples"] == 4
    assert len(settings_in_force(EvaluateConfig(), list(TASKS.values()))) == len(fields(EvaluateConfig))


def test_each_task_has_its_settings_beside_the_figures():
    config = EvaluateConfig(("perplexity", "generative_perplexity"), num_samples=2, max_rows=None)
    found = settings_by_task(config)
    assert set(found["perplexity"]) == set(TASKS["perplexity"].heeds)
    assert (found["perplexity"]["num_samples"], found["perplexity"]["max_rows"]) == (2, None)
    assert set(found["generative_perplexity"]) == {"generative", "sampling", "seed"}
    assert json.loads(json.dumps(found)) == found


def test_benchmarks_on_two_workers_and_after_a_loss_are_those_of_one(stages, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    lines = [{"text": f"The {n}", "choices": [f" {n}", " and the"]} for n in range(70)]  # more than a block
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "toy",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "toy.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
    }
    (tmp_path / "toy.yaml").write_text(json.dumps(task))
    benchmarks = BenchmarkConfig(("toy",), task_folder=str(tmp_path), score=ScoreConfig(num_samples=4))
    config = EvaluateConfig(tasks=("benchmarks",), benchmarks=benchmarks)
    output = tmp_path / "out"
    options = {
        "model": stages.pretrained,
        "data": None,
        "output": str(output),
        "cluster": ClusterConfig(min_replicas=2, max_replicas=2, cpus_per_replica=0.5),
        "progress": False,
    }
    results = evaluate(config, **options)["results"]
    blocks = sorted((output / "requests").rglob("*.json"))
    assert len(blocks) == 3
    answers = _answers(output)
    for lost in (output / "manifest.json", output / "results.json", blocks[1]):
        lost.unlink()
    kept = blocks[0].stat().st_mtime_ns
    assert evaluate(config, **options)["results"] == results
    assert blocks[0].stat().st_mtime_ns == kept
    assert _answers(output) == answers

    def here(build, blocks, *, folder):
        return map(build(), blocks)

    def open_model(*, fast):
        return llada.load(stages.pretrained, dtype=resolve_precision("auto", torch.device("cpu")))

    alone = Evaluation(
        config, "m", open_model, None, str(tmp_path / "alone"), here, lambda: stages.pretrained
    )
    assert run_benchmarks(alone) | {"settings": settings_by_task(config)} == results
    assert {path.name for path in output.iterdir()} >= {"benchmarks.md", "benchmarks.svg", "results.json"}


def _answers(output):
    """What was asked and answered, without the time that it took."""
    lines = [json.loads(line) for line in (output / "benchmarks" / "toy.jsonl").read_text().splitlines()]
    for line in lines:
        assert [request.pop("seconds") for request in line["requests"]] > [0, 0]
    return lines


def test_beside_published_settings_the_given_ones_are_known():
    words = [
        "--model",
        "m",
        "--output",
        "o",
        "--benchmarks.score.cfg-scale",
        "0",
        "--sampling.no-logits-eos-inf",
    ]
    assert parse_words(words).config.benchmarks.given == ()
    args = parse_words([*words, "--benchmarks.settings", "llada_base_cfg"])
    assert args.config.benchmarks.given == ("sampling.logits_eos_inf", "score.cfg_scale")


def test_two_results_are_compared(tmp_path, capsys):
    for name, right in (("a", 1), ("b", 3)):
        (tmp_path / name / "benchmarks").mkdir(parents=True)
        rows = [{"doc_hash": str(n), "filter": "none", "acc": float(n < right)} for n in range(4)]
        (tmp_path / name / "benchmarks" / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        summary = {"title": "T", "metric": "acc", "filter": "none", "tasks": ["t"], "is_mean_of_tasks": False}
        summary |= {"is_share": True, "value": right / 4, "settings": {"seed": right}, "settings_hash": name}
        (tmp_path / name / "results.json").write_text(json.dumps({"benchmarks": {"t": summary}}))
    main(["--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--resamples", "1000"])
    header, _, row, remark = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "Benchmark"
    assert row.split() == ["T", "4", "25.0", "%", "75.0", "%", "+50.0", "[+0.0,", "+100.0]"]
    assert remark == "t: other settings (seed 1 / 3)"


@pytest.mark.slow  # in every run, benchmarks take the same way below, and a bound does
@pytest.mark.parametrize(
    ("names", "folders", "records"),
    [
        (
            ("generative_perplexity", "understanding"),
            ("written", "judged", "understanding"),
            ("generated.jsonl", "understanding.jsonl"),
        ),
        (("text_perplexity", "reversal"), ("texts/notes", "poems"), ("reversal.jsonl",)),
    ],
    ids=str,
)
def test_a_task_on_two_workers_and_after_a_loss_is_that_of_one(names, folders, records, local_ray, tmp_path):
    (tmp_path / "notes.txt").write_text("The cat sat on the mat, and it was late. " * 40)
    _write_lines(tmp_path / "poems.jsonl", [{"first": f"The {n}", "second": "it"} for n in range(12)])
    rows = [{"text": f"{who} {n}", "label": who} for n in range(10) for who in ("The cat", "It was")]
    _write_lines(tmp_path / "rows.jsonl", rows)
    model = _save_checkpoint(tmp_path / "model")
    _save_checkpoint(tmp_path / "judge", causal=True)
    settings = {
        "texts": TextsConfig((str(tmp_path / "notes.txt"),), block_length=32),
        "poems": PoemsConfig(str(tmp_path / "poems.jsonl"), chat=False),
        "generative": GenerativeConfig(
            str(tmp_path / "judge"), num_texts=10, texts_per_forward=4, context=16
        ),
        "understanding": UnderstandingConfig(
            *[str(tmp_path / "rows.jsonl")] * 2, num_epochs=2, batch_rows=4, seeds=2
        ),
        "sampling": SamplingConfig(gen_length=12, steps=4, block_length=12, remasking="ancestral"),
        "num_samples": 2,
        "rows_per_block": 3,
    }
    heeded = {name for task in names for name in TASKS[task].heeds}
    config = EvaluateConfig(names, **{name: value for name, value in settings.items() if name in heeded})
    options = {"model": model, "data": None, "progress": False}
    workers = [ClusterConfig(min_replicas=n, max_replicas=n, cpus_per_replica=0.5) for n in (1, 2)]
    output = tmp_path / "two"
    results = evaluate(config, output=str(output), cluster=workers[1], **options)["results"]

    def here(build, blocks, *, folder):
        return map(build(), blocks)

    def open_model(*, fast):
        precision = resolve_precision("auto", torch.device("cpu")) if fast else None
        return llada.load(model, dtype=precision)

    alone = Evaluation(config, "m", open_model, None, str(tmp_path / "one"), here, lambda: model)
    expected = {name: value for task in names for name, value in TASKS[task].measure(alone).items()}
    assert results.pop("settings") == settings_by_task(config)
    assert results == pytest.approx(expected, rel=1e-5)
    assert set(results) == set(expected)
    written = [(output / name).read_text() for name in records]
    assert all(written)
    # After a crash, by one worker in the place of two, what is there is kept.
    blocks = {folder: sorted((output / folder).glob("*.json")) for folder in folders}
    assert all(len(found) >= 2 for found in blocks.values())
    for lost in (output / "manifest.json", *(blocks[folder][-1] for folder in (folders[0], folders[-1]))):
        lost.unlink()
    kept = {found[0]: found[0].stat().st_mtime_ns for found in blocks.values()}
    again = evaluate(config, output=str(output), cluster=workers[0], **options)["results"]
    assert again.pop("settings") == settings_by_task(config)
    assert again == pytest.approx(results, rel=1e-6)
    assert [(output / name).read_text() for name in records] == written
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    # Another file is other work, and is not taken for this one.
    for name in ("notes.txt", "rows.jsonl"):
        (tmp_path / name).write_text((tmp_path / name).read_text() * 2)
    with pytest.raises(UserError, match=r"made from other inputs \(.*(notes\.txt|rows\.jsonl)"):
        evaluate(config, output=str(output), cluster=workers[1], **options)


def _write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _save_checkpoint(folder, **changes):
    """A random network of 16 dimensions with a tokenizer; the folder."""
    tokenizer = train_tokenizer(["The cat sat on the mat, and it was late."] * 5, 300)
    ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    network = Transformer(ModelConfig(300, 16, 1, 2, 32, max_length=160, **ids, **changes))
    network.init_weights(0)
    save_model(network, folder)
    save_tokenizer(tokenizer, folder)
    return str(folder)
