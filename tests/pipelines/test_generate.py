"""`llada generate`: answers do not depend on batches or actors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import llada
from llada.errors import UserError
from llada.sampling.text import complete_texts
from pipelines.generate import GenerateConfig, generate, parse_prompts
from pipelines.stage.cluster import ClusterConfig

pytestmark = pytest.mark.integration


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
    runs = []
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
        runs.append([(a["id"], a.get("text"), a.get("tokens")) for a in answers(output)])
    assert runs[0] == runs[1]
    assert [a[0] for a in runs[0]] == [0, 1, 2, 3, 4, 5]
    refused = answers(str(tmp_path / "rows-16"))[5]
    assert "exceed the model's context of 96" in refused["error"]
    model, tokenizer = llada.load(stages.model)
    alone = complete_texts(model, tokenizer, ["A model restores"], sampling, seed=[3 + 1])[0]
    assert runs[0][1][1] == alone["text"]


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
