"""`llada generate`: answers do not depend on batches or actors."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from torch._inductor import config as inductor

import llada
from llada.errors import UserError
from llada.sampling.completions import complete_texts
from pipelines.generate import GenerateConfig, _Writer, generate, parse_prompts
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
    assert "exceeds the context length of 96" in refused["error"]
    model, tokenizer = llada.load(stages.model)
    alone = complete_texts(model, tokenizer, ["A model restores"], sampling, seed=[3 + 1])[0]
    assert runs[0][1][1] == alone["text"]


def test_without_a_compiler_nothing_is_answered_compiled(stages):
    """Not line by line, each with an error."""
    config = GenerateConfig(compiled=True)
    with (
        inductor.patch("cpp.cxx", (None, "no-such-compiler")),
        pytest.raises(UserError, match=r"compiled: torch finds no C\+\+ compiler"),
    ):
        _Writer(config, model=stages.model)


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
    assert records(f"{line}\n{line}\n".encode()) == [json.loads(line)] * 2


def records(data: bytes, url: str = "a.jsonl", *, chat: bool = False) -> list[dict]:
    lines = parse_prompts(data, url, chat=chat)
    assert all(line.problem is None for line in lines)
    return [line.record for line in lines]


def test_files_of_other_systems():
    assert records(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n \n{"prompt": "b"}') == [
        {"prompt": "a"},
        {"prompt": "b"},
    ]
    assert records(b"\xef\xbb\xbfone\r\n\r\n two \r\n", "a.txt") == [{"prompt": "one"}, {"prompt": " two "}]


def test_messages_are_read_as_in_training():
    turns = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
    ]
    turns.append({"role": "assistant", "content": "a", "weight": 0})
    line = json.dumps({"messages": turns, "prompt": None, "id": 3}).encode()
    said = [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert records(line) == [{"id": 3, "prompt": [{"role": role, "content": text} for role, text in said]}]
    asked = [{"role": "user", "content": "x"}]
    assert records(b'{"prompt": "x", "text": "own"}', chat=True) == [{"prompt": asked, "text": "own"}]


def test_what_stands_beside_a_conversation_is_part_of_it():
    tools = [{"type": "function", "function": {"name": "look"}}]
    beside = {"system": "s", "context": "c", "tools": tools}
    told = [{"role": "system", "content": "s"}, {"role": "user", "content": "q\n\nc"}]
    for asked, chat in (({"messages": [{"role": "user", "content": "q"}]}, False), ({"prompt": "q"}, True)):
        (line,) = parse_prompts(json.dumps({**asked, **beside}).encode(), "a.jsonl", chat=chat)
        assert (line.record, line.tools, line.problem) == ({**beside, "prompt": told}, tools, None)
    text = {"prompt": "q", **beside}
    (line,) = parse_prompts(json.dumps(text).encode(), "a.jsonl", chat=False)
    assert (line.record, line.tools) == (text, ())


def test_tools_are_written_by_the_template_or_the_line_is_refused(stages, tmp_path):
    asked = {"messages": [{"role": "user", "content": "The"}]}
    lines = [{**asked, "tools": [{"name": "look"}]}, asked]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    generate(
        GenerateConfig(sampling=stages.recipe.sampling),
        model=stages.model,
        prompts=str(tmp_path / "prompts.jsonl"),
        output=str(tmp_path / "o"),
        cluster=stages.cluster,
        progress=False,
    )
    refused, answered = answers(str(tmp_path / "o"))
    assert "does not write tools" in refused["error"]
    assert answered["text"]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (b"{", "a.jsonl:7: not JSON"),
        (b"[" * 100_000, "a.jsonl:7: not JSON"),
        (b'["x"]', "a.jsonl:7: a prompt line is"),
        (b'{"prompt": "a\\ud800"}', "a.jsonl:7: the prompt holds half of a surrogate pair"),
        (b'{"prompt": "a\xed\xa0\x80"}', "a.jsonl:7 is not UTF-8 text"),
        (b'{"messages": [{"role": "user", "content": "a\\ud800"}]}', r"a.jsonl:7: .*\(not_utf8\)"),
        (
            b'{"messages": [{"role": "user", "content": "a"}], "tools": ["\\ud800"]}',
            r"a.jsonl:7: .*\(not_utf8\)",
        ),
        (b'{"prompt": "x", "messages": []}', "a.jsonl:7: .* not both"),
    ],
)
def test_one_bad_line_among_many_is_said_and_the_others_are_kept(caplog, bad, problem):
    lines = [b'{"prompt": "x"}'] * 20
    found = parse_prompts(b"\n".join([*lines[:6], bad, *lines[6:]]), "a.jsonl", chat=False)
    assert [line.problem is None for line in found] == [True] * 6 + [False] + [True] * 14
    assert re.match(problem, found[6].problem)
    assert [re.match(problem, record.getMessage()) is not None for record in caplog.records] == [True]


def test_a_file_of_something_else_is_refused():
    with pytest.raises(
        UserError, match=r"a.jsonl:1: a prompt line is .*; 1 more of 3 lines cannot be used either"
    ):
        parse_prompts(b'{"text": "a"}\n{"text": "b"}\n{"prompt": "c"}', "a.jsonl", chat=False)


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
        prompts=str(file),
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
