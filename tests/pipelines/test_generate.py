"""`llada generate`: answers do not depend on batches or actors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch._inductor import config as inductor

import llada
from llada.errors import UserError
from llada.sampling.completions import complete_texts
from pipelines.generate import GenerateConfig, ShardWriter, generate
from pipelines.stage.cluster import ClusterConfig

pytestmark = pytest.mark.integration
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [
        {"prompt": text, "id": i} for i, text in enumerate(("The", "A model restores", "", "Every row of"))
    ]
    lines.append({"messages": [{"role": "user", "content": "What is 3?"}], "id": 4})
    lines.append({"prompt": "far too long " * 100, "id": 5})
    # Which the template does not write.
    lines.append({"messages": [{"role": "user", "content": "The"}], "tools": [{"name": "look"}], "id": 6})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def answers(output: str) -> list[dict]:
    return [json.loads(line) for line in written(output).decode().splitlines()]


def written(output: str) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(Path(output, "generations").iterdir()))


def test_answers_do_not_depend_on_batches_and_stand_in_order(stages, tmp_path, prompts):
    sampling = replace(stages.recipe.sampling, temperature=1.0)
    runs = []
    for rows, shard_rows, actors in ((16, 512, 1), (1, 3, 2)):
        output = str(tmp_path / f"rows-{rows}")
        manifest = generate(
            GenerateConfig(sampling=sampling, seed=3, batch_rows=rows, shard_rows=shard_rows),
            model=stages.model,
            prompts=[prompts],
            output=output,
            cluster=ClusterConfig(min_replicas=actors, max_replicas=actors, cpus_per_replica=0.5),
            progress=False,
        )
        assert manifest["counts"]["prompts"] == 7
        assert manifest["counts"]["refused"] == 2
        assert manifest["counts"]["shards"] == -(-7 // shard_rows)
        runs.append(written(output))
    assert runs[0] == runs[1]
    found = answers(str(tmp_path / "rows-16"))
    for line, answer in zip(Path(prompts).read_text().splitlines(), found, strict=True):
        assert json.loads(line).items() <= answer.items()
    assert [answer["id"] for answer in found] == [answer["index"] for answer in found] == list(range(7))
    assert [number for number, answer in enumerate(found) if "error" in answer] == [5, 6]
    assert "exceeds the context length of 96" in found[5]["error"]
    assert "does not write tools" in found[6]["error"]
    model, tokenizer = llada.load(stages.model)
    alone = complete_texts(model, tokenizer, ["A model restores"], sampling, seed=[3 + 1])[0]
    told = ("text", "finish_reason", "tokens", "nfe")
    assert {name: found[1][name] for name in told} == {name: alone[name] for name in told}


def test_without_a_compiler_nothing_is_answered_compiled(stages):
    """Not line by line, each with an error."""
    config = GenerateConfig(compiled=True)
    with (
        inductor.patch("cpp.cxx", (None, "no-such-compiler")),
        pytest.raises(UserError, match=r"compiled: torch finds no C\+\+ compiler"),
    ):
        ShardWriter(config, model=stages.model, output="", nested=None)


def test_settings_that_the_model_cannot_follow_are_no_matter_of_a_line(stages):
    config = GenerateConfig(sampling=replace(stages.recipe.sampling, gen_length=97))
    with pytest.raises(UserError, match="exceeds the context length of 96"):
        ShardWriter(config, model=stages.model, output="", nested=None)


def test_finished_shards_are_not_done_again(stages, tmp_path, prompts):
    output = str(tmp_path / "generations")
    options = {"model": stages.model, "prompts": [prompts], "output": output, "cluster": stages.cluster}
    config = GenerateConfig(sampling=stages.recipe.sampling, shard_rows=4)
    generate(config, progress=False, **options)
    first = written(output)
    kept, lost = sorted(Path(output, "generations").iterdir())
    stamp = kept.stat().st_mtime_ns
    # As after a kill: one shard is written and not told of.
    (told,) = Path(output, "shards").glob(f"{lost.stem}-*.json")
    for file in (told, Path(output, "manifest.json")):
        file.unlink()
    lost.write_bytes(b"half of")
    generate(config, progress=False, **options)
    assert written(output) == first
    assert kept.stat().st_mtime_ns == stamp


@pytest.mark.slow
@pytest.mark.timeout(1800)  # three runs, each with a Ray of its own
def test_a_killed_run_goes_on_to_the_same_bytes(stages, tmp_path):
    """With the same command, from files of several folders."""
    for number in range(3):
        lines = [{"prompt": f"Number {number}{i}", "id": [number, i]} for i in range(20)]
        file = tmp_path / "prompts" / f"{number % 2}" / f"{number}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--model", stages.model, "--prompts", str(tmp_path / "prompts"), "--shard-rows", "4"]
    words += ["--sampling.gen-length", "16", "--sampling.block-length", "8"]

    def command(output: Path) -> list[str]:
        return [sys.executable, "-m", "pipelines.generate", *words, "--output", str(output)]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, cwd=REPOSITORY)
    with subprocess.Popen(command(killed), cwd=REPOSITORY, start_new_session=True) as process:
        deadline = time.monotonic() + 240
        while len(list(killed.glob("shards/*.json"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    done = {file.name: file.stat().st_mtime_ns for file in killed.glob("shards/*.json")}
    subprocess.run(command(killed), check=True, cwd=REPOSITORY)
    assert len(answers(str(killed))) == 60
    assert {file.name: file.read_bytes() for file in killed.glob("generations/*")} == {
        file.name: file.read_bytes() for file in whole.glob("generations/*")
    }
    assert {name: (killed / "shards" / name).stat().st_mtime_ns for name in done} == done


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
            prompts=[str(tmp_path / name)],
            output=str(tmp_path / "o"),
            cluster=stages.cluster,
        )


def test_no_field_of_a_line_is_lost(stages, tmp_path):
    own = {
        "index": "mine",
        "text": "mine",
        "error": None,
        "finish_reason": 1,
        "tokens": [2],
        "nfe": 3,
        "generated": 4,
    }
    lines = [{"prompt": "The", **own}, {"prompt": "The", "note": "\ud800"}, {"prompt": "far too long " * 100}]
    lines += [{"prompt": "The"}] * 10
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    manifest = generate(
        GenerateConfig(sampling=stages.recipe.sampling),
        model=stages.model,
        prompts=[str(file)],
        output=str(tmp_path / "o"),
        cluster=stages.cluster,
        progress=False,
    )
    found = answers(str(tmp_path / "o"))
    added = [answer.pop("generated_") for answer in found]
    assert found == [*lines, {}]
    assert [answer["index"] for answer in added] == list(range(14))
    assert [number for number, answer in enumerate(added) if "error" in answer] == [2, 13]
    assert "exceeds the context length" in added[2]["error"]
    assert "prompts.jsonl:14: not JSON" in added[13]["error"]
    assert set(added[0]) == {"index", "text", "finish_reason", "tokens", "nfe"}
    assert (manifest["counts"]["prompts"], manifest["counts"]["refused"]) == (14, 2)
