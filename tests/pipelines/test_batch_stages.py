"""evaluate and generate: figures equal the plain functions, answers do not depend on batches or actors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import llada
from llada.data.tokens.shards import TokenDataset
from llada.errors import UserError
from llada.sampling.text import complete_texts
from pipelines.evaluate import EvaluateConfig, evaluate, read_results
from pipelines.generate import GenerateConfig, generate, parse_prompts
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
    results = read_results(output)
    dataset = TokenDataset(stages.data, "validation")
    rows = dataset.rows(np.arange(len(dataset)))
    model, _ = llada.load(stages.pretrained)
    bound = llada.perplexity_bound(
        model,
        torch.from_numpy(rows.tokens),
        maskable=torch.from_numpy(rows.maskable),
        segment_ids=torch.from_numpy(rows.segment_ids),
        num_samples=2,
    )
    assert results["nats_per_token"] == pytest.approx(bound.nats_per_token, rel=1e-5)
    assert results["standard_error"] == pytest.approx(bound.standard_error, rel=1e-4)
    assert results["rows"] == len(dataset)
    assert results["ratio_to_unigram"] == pytest.approx(
        results["nats_per_token"] / results["unigram_nats_per_token"]
    )
    sample = results["samples"][0]
    assert sample["prompt"] == "The"
    assert "<|" not in sample["text"]


def test_evaluation_refuses_other_data(stages, tmp_path):
    common = {"cluster": stages.cluster, "progress": False, "output": str(tmp_path / "o")}
    with pytest.raises(UserError, match="needs --data"):
        evaluate(EvaluateConfig(), model=stages.pretrained, data=None, **common)
    with pytest.raises(UserError, match="no checkpoint at"):
        evaluate(EvaluateConfig(), model=str(tmp_path / "none"), data=stages.data, **common)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [
        {"prompt": text, "id": i} for i, text in enumerate(("The", "A model restores", "", "Every row of"))
    ]
    lines.append({"messages": [{"role": "user", "content": "What is 3?"}], "id": 4})
    lines.append({"prompt": "far too long " * 100, "id": 5})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def answers(output: str) -> list[dict]:
    return [json.loads(line) for line in Path(output, "generations.jsonl").read_text().splitlines()]


def test_answers_do_not_depend_on_batches_and_stand_in_order(stages, tmp_path, prompts):
    sampling = replace(stages.recipe.sampling, temperature=1.0)
    found = []
    for rows, actors in ((16, 1), (2, 2)):
        output = str(tmp_path / f"rows-{rows}")
        manifest = generate(
            GenerateConfig(sampling=sampling, seed=3, batch_rows=rows),
            model=stages.model,
            prompts=prompts,
            output=output,
            cluster=ClusterConfig(min_replicas=actors, max_replicas=actors, cpus_per_replica=0.5),
            progress=False,
        )
        assert manifest["counts"]["prompts"] == 6
        assert manifest["counts"]["refused"] == 1
        found.append([(a["id"], a.get("text"), a.get("tokens")) for a in answers(output)])
    assert found[0] == found[1]
    assert [a[0] for a in found[0]] == [0, 1, 2, 3, 4, 5]
    refused = answers(str(tmp_path / "rows-16"))[5]
    assert "exceed the model's context of 96" in refused["error"]
    model, tokenizer = llada.load(stages.model)
    alone = complete_texts(model, tokenizer, ["A model restores"], sampling, seed=[3 + 1])[0]
    assert found[0][1][1] == alone["text"]


def test_finished_blocks_are_not_done_again(stages, tmp_path, prompts):
    output = str(tmp_path / "generations")
    options = {"model": stages.model, "prompts": prompts, "output": output, "cluster": stages.cluster}
    config = GenerateConfig(sampling=stages.recipe.sampling, batch_rows=3)
    generate(config, progress=False, **options)
    first = Path(output, "generations.jsonl").read_bytes()
    kept, lost = sorted(Path(output, "blocks").glob("*.json"))
    stamp = kept.stat().st_mtime_ns
    for file in (lost, Path(output, "manifest.json"), Path(output, "generations.jsonl")):
        file.unlink()
    generate(config, progress=False, **options)
    assert Path(output, "generations.jsonl").read_bytes() == first
    assert kept.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", "a.jsonl:1: not JSON"),
        ("b.jsonl", '{"prompt": "x"}\n{"text": 1}\n', "b.jsonl:2: a prompt line is"),
        ("c.jsonl", "\n\n", "holds no prompt"),
        (
            "d.jsonl",
            '{"messages": [{"role": "user"}]}',
            r"d.jsonl:1: the messages cannot be used \(null_text",
        ),
        ("e.jsonl", '{"messages": [{"role": "wizard", "content": "x"}]}', "e.jsonl:1: .*unknown_role"),
    ],
)
def test_bad_prompt_files(stages, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        generate(
            GenerateConfig(),
            model=stages.model,
            prompts=str(tmp_path / name),
            output=str(tmp_path / "o"),
            cluster=stages.cluster,
        )


def test_a_line_separator_inside_a_prompt_is_text():
    line = '{"prompt": "one\u2028two\u0085three"}'
    assert parse_prompts(f"{line}\n{line}\n".encode(), "a.jsonl", chat=False) == [json.loads(line)] * 2
