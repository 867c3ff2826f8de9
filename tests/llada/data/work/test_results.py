"""What tasks leave behind, in the form in which unfinished folders hold it."""

import json
from dataclasses import replace

from llada.data.outcomes import Report
from llada.data.tokens.manifest import ShardEntry
from llada.data.work.results import FilteredUnit, PackedUnit, read_json

SHARD = ShardEntry("train", "train/a-000.safetensors", 2, 3, 15, 400, "abc", "web")


def test_a_packed_unit_is_spelled_as_ever(tmp_path):
    url = str(tmp_path / "a.json")
    packed = PackedUnit("a", [["web/a.jsonl", "etag"]], Report("web", 1, 10), [SHARD])
    packed.write(url)
    stored = json.loads((tmp_path / "a.json").read_text())
    assert list(stored) == ["name", "inputs", "report", "shards"]
    assert list(stored["shards"][0]) == ["split", "name", "rows", "segments", "tokens", "bytes", "sha256"]
    assert PackedUnit.read(url) == packed
    examples = replace(packed, shards=[replace(SHARD, lengths=[7, 8])])
    examples.write(url)
    assert PackedUnit.read(url) == examples


def test_a_filtered_unit_is_spelled_as_ever(tmp_path):
    url = str(tmp_path / "a.json")
    counts = {"documents": 3, "rows": 45, "fingerprint": 7}
    filtered = FilteredUnit(counts, [["web/a.jsonl", "etag"]], Report("web", 1, 10))
    filtered.write(url)
    stored = json.loads((tmp_path / "a.json").read_text())
    assert list(stored) == ["counts", "inputs", "report"]
    assert FilteredUnit.read(url) == filtered


def test_what_is_missing_or_half_written_is_not_done(tmp_path):
    (tmp_path / "half.json").write_text('{"counts": ')
    for name in ("half.json", "none.json"):
        url = str(tmp_path / name)
        assert read_json(url) is PackedUnit.read(url) is FilteredUnit.read(url) is None
