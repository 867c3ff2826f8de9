"""llada/data/read/json_values.py: arrays and objects in any layout, in pieces, and what damage costs."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc

import pytest

from llada.data.outcomes import Rejects
from llada.data.read import json_values
from llada.data.read.dialogues import read_dialogues
from llada.data.read.formats import is_divisible
from llada.data.read.listing import list_inputs
from llada.data.read.parts import Part, ReadOptions

RECORDS = [{"text": f'text {i} é\n[{{"', "notes": [{"text": "inner"}, "}, {"]} for i in range(4000)]
TEXTS = [record["text"] for record in RECORDS]
LAYOUTS = {
    "compact": json.dumps(RECORDS, separators=(",", ":"), ensure_ascii=False),
    "one line": json.dumps(RECORDS),
    "indented": json.dumps(RECORDS, indent=4),
    "object a line": "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    "byte order mark": "\ufeff \n" + json.dumps(RECORDS),
}
OTHERS = {
    "lines": "\n".join(map(json.dumps, RECORDS)),
    "indented objects": "\n".join(json.dumps(record, indent=2) for record in RECORDS),
}


@pytest.fixture
def read_json(tmp_path, read):
    """read_json(data, name, **options): (texts, rejects)."""

    def read_file(data, name="a.json", **options):
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return read(tmp_path / name, **options)

    return read_file


@pytest.mark.parametrize("layout", [*LAYOUTS, *OTHERS])
def test_every_layout_gives_the_same_texts(read_json, layout):
    data = (LAYOUTS | OTHERS)[layout]
    for name, content in (("a.json", data), ("a.json.gz", gzip.compress(data.encode()))):
        found, rejects = read_json(content, name)
        assert found == TEXTS
        assert not rejects.counts
        assert not rejects.left_out


def test_lines_alone_are_cut(tmp_path, read):
    for layout, data in (LAYOUTS | OTHERS).items():
        (tmp_path / "a.json").write_text(data)
        assert is_divisible(str(tmp_path / "a.json")) is (layout == "lines")
    (tmp_path / "a.json").write_text(OTHERS["lines"])
    halves = read(tmp_path / "a.json", end=100_000)[0] + read(tmp_path / "a.json", start=100_000)[0]
    assert halves == TEXTS
    (tmp_path / "a.jsonl").write_text(OTHERS["indented objects"])
    assert is_divisible(str(tmp_path / "a.jsonl")), "its name says what it holds"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_broken_object_costs_itself(read_json, layout):
    for at in (0, 2000, 3999):
        whole = json.dumps(f"text {at} é", ensure_ascii=layout != "compact")[:-1]
        broken = LAYOUTS[layout].replace(whole, whole + '"', 1)
        assert broken != LAYOUTS[layout]
        found, rejects = read_json(broken)
        assert found == TEXTS[:at] + TEXTS[at + 1 :]
        assert dict(rejects.counts) == {"invalid_json": 1}
        assert rejects.examples[0]["line"] == at + 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cut_file_gives_what_was_whole(read_json, layout):
    data = LAYOUTS[layout]
    for share in (0.1, 0.5, 0.9, 0.9999):
        found, rejects = read_json(data[: int(share * len(data))])
        assert found == TEXTS[: len(found)]
        assert len(found) >= int(share * 4000) - 3
        assert dict(rejects.counts) == {"truncated_file": 1}


def test_what_is_no_object_and_what_follows_the_array(read_json):
    found, rejects = read_json('[{"text": "a"}, 3, null, {"text": "b"}] more')
    assert found == ["a", "b"]
    assert dict(rejects.counts) == {"not_an_object": 2, "invalid_json": 1}


def test_objects_that_are_too_large_or_no_utf8(read_json):
    for indent in (None, 2):
        data = json.dumps([{"text": "x" * 5_000_000}, {"text": "b"}], indent=indent)
        found, rejects = read_json(data, max_record_bytes=1000)
        assert (found, dict(rejects.counts)) == (["b"], {"too_large": 1})
    found, rejects = read_json(b'[{"text": "caf\xe9"}, {"text": "b"}]')
    assert (found, dict(rejects.counts)) == (["b"], {"not_utf8": 1})


@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_that_stands_alone_may_be_no_record(read_json, indent):
    infos = {"default": {"description": "", "features": {"text": {"dtype": "string"}}, "splits": [1, 2]}}
    found, rejects = read_json(json.dumps(infos, indent=indent), "dataset_infos.json")
    assert (found, dict(rejects.counts)) == ([], {})
    (reason,) = rejects.left_out
    assert reason == "JSON object without 'text'"
    assert rejects.left_out[reason]["examples"][0].endswith("/dataset_infos.json")
    found, rejects = read_json(json.dumps({"text": "a text"}, indent=indent))
    assert (found, rejects.left_out) == (["a text"], {})


@pytest.mark.parametrize("data", ["[1, 2, 3]", '["a", "b"]', "[[1], [2]]", "[\n  null\n]"])
def test_an_array_without_objects_is_left_out(read_json, data):
    found, rejects = read_json(data)
    assert (found, dict(rejects.counts)) == ([], {})
    assert list(rejects.left_out) == ["JSON array that holds no objects"]
    assert read_json("[]")[1] == read_json(" [ ] ")[1] == Rejects()


def test_a_description_beside_dialogues_is_left_out(tmp_path):
    rejects = Rejects()
    for name, content in {
        "a.json": [{"prompt": "a", "response": "b"}, {"other": 1}],
        "b.json": {"prompt": "a", "response": "b"},
        "infos.json": {"default": {}},
    }.items():
        (tmp_path / name).write_text(json.dumps(content, indent=2))
        (file,) = list_inputs([str(tmp_path / name)])
        found = list(read_dialogues(Part(file, file.size), rejects, ReadOptions()))
        assert len(found) == (name != "infos.json")
    assert dict(rejects.counts) == {"unknown_sft_format": 1}
    assert rejects.left_out["JSON object that is no dialogue"]["files"] == 1


def test_the_first_of_many_lines_may_be_broken(read_json):
    for first in ('{"text": "cut', "{bad", '{"text": "a"', "{"):
        found, rejects = read_json(f"{first}\n" + OTHERS["lines"])
        assert found == TEXTS
        assert dict(rejects.counts) == {"invalid_json": 1}


def test_the_memory_does_not_grow_with_the_array(tmp_path):
    peaks = []
    for count in (5_000, 40_000):
        path = tmp_path / "a.json"
        path.write_text(json.dumps([{"text": random.Random(0).randbytes(50).hex()}] * count))
        (file,) = list_inputs([str(path)])
        tracemalloc.start()
        part = Part(file, file.size)
        assert sum(1 for _ in json_values.read_json(part, ReadOptions(), Rejects())) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
