"""What of the input is new, and what stands at the top of the folder; without a cluster."""

import json

import pytest

from llada.data.work.config import PrepareConfig, SourceConfig
from llada.data.work.job import Snapshot
from llada.errors import UserError
from pipelines.corpus.snapshots import finished_snapshots, open_plan, publish, refresh, still_unread
from pipelines.stage.artifact import open_output

CONFIG = PrepareConfig(unit_bytes=1)


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / f"in/{name}.txt").write_text(name * 10)
    return [SourceConfig("web", (str(tmp_path / "in"),), weight=1.0)]


def finish(snapshot, unreadable=()):
    counts = {"unreadable_files": list(unreadable), "dedup_id": "", "resources_hash": ""}
    tokens = {"web": {"documents": 1, "rows": 1, "tokens": 100}}
    dataset = {"kind": "pretrain", "row_length": 8, "splits": {}, "sources": tokens, "epochs": {}}
    return publish({"counts": counts, "dataset": dataset, "files": {}}, snapshot)


def names(plan):
    return [part.file.name for unit in plan.group(0) for part in unit.parts]


def test_each_snapshot_takes_what_is_new(tmp_path, sources):
    output = str(tmp_path / "out")
    first = Snapshot(output, 0)
    plan = open_plan(CONFIG, sources, first, [])
    assert names(plan) == ["in/a.txt", "in/b.txt"]
    (tmp_path / "in/c.txt").write_text("c")
    assert open_plan(CONFIG, sources, first, []) == plan  # an unfinished one goes on with what was listed
    finish(first)
    earlier = finished_snapshots(output)
    assert [finished.snapshot for finished in earlier] == [first]
    assert names(open_plan(CONFIG, sources, Snapshot(output, 1), earlier)) == ["in/c.txt"]
    (tmp_path / "in/a.txt").write_text("another text")
    moved = [SourceConfig("web", (*sources[0].input, str(tmp_path / "in/c.txt")), weight=1.0)]
    with pytest.raises(UserError, match=r"a\.txt has changed since it was prepared"):
        open_plan(CONFIG, moved, Snapshot(output, 1), earlier)


def test_what_could_not_be_read_is_tried_again(tmp_path, sources):
    output, label = str(tmp_path / "out"), str(tmp_path / "in/b.txt")
    open_plan(CONFIG, sources, Snapshot(output, 0), [])
    finish(Snapshot(output, 0), [label])
    earlier = finished_snapshots(output)
    plan = open_plan(CONFIG, sources, Snapshot(output, 1), earlier)
    assert names(plan) == ["in/b.txt"]
    assert still_unread(plan, [label, "elsewhere.txt"]) == ["elsewhere.txt"]


def test_the_top_follows_the_newest_snapshot_and_the_weights(tmp_path, sources):
    output = tmp_path / "out"
    folder = open_output(str(output), stage="prepare", config={}, inputs=[])
    with pytest.raises(UserError, match="there is no file to read in .*in"):
        refresh(folder, sources, [])
    open_plan(CONFIG, sources, Snapshot(str(output), 0), [])
    top = finish(Snapshot(str(output), 0))
    (output / "manifest.json").unlink()
    earlier = finished_snapshots(str(output))
    assert open_plan(CONFIG, sources, Snapshot(str(output), 1), earlier) is None
    assert refresh(folder, sources, earlier) == top == json.loads((output / "manifest.json").read_text())
    half = [SourceConfig("web", sources[0].input, max_tokens=50)]
    assert refresh(folder, half, earlier)["dataset"]["epochs"] == {"web": 0.5}
    assert finished_snapshots(str(output))[0].dataset.epochs == {"web": 0.5}
