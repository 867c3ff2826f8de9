"""Planning the work units of an input (their processing: tests/llada/data/test_prepare.py)."""

from llada.data.read.listing import list_inputs
from llada.data.work.units import UNITS_PER_GROUP, SeenFiles, cut_file, read_plan, write_plan


def parts(unit_bytes, *inputs):
    return (
        ("", part) for file in list_inputs([str(i) for i in inputs]) for part in cut_file(file, unit_bytes)
    )


def test_a_plan_is_written_in_groups_and_read_back(tmp_path):
    for i in range(2 * UNITS_PER_GROUP + 3):
        (tmp_path / f"{i:04d}.txt").write_text(str(i))
    plan = write_plan(str(tmp_path / "plan"), parts(1, tmp_path), unit_bytes=1)
    assert (plan.units, plan.groups, plan.files) == (2 * UNITS_PER_GROUP + 3, 3, 2 * UNITS_PER_GROUP + 3)
    assert read_plan(str(tmp_path / "plan")) == plan
    names = [plan.unit(i).parts[0].file.name.rpartition("/")[2] for i in (0, 300, 514)]
    assert names == ["0000.txt", "0300.txt", "0514.txt"]
    assert len(plan.group(2)) == 3
    (tmp_path / "plan/plan.json").unlink()
    assert read_plan(str(tmp_path / "plan")) is None
    assert write_plan(str(tmp_path / "none"), iter(()), 1) is None


def test_a_plan_says_what_its_input_left_out(tmp_path):
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text("x")
    left_out = {}
    files = list_inputs([str(tmp_path)], left_out=left_out)
    whole = (("", part) for file in files for part in cut_file(file, 1))
    plan = write_plan(str(tmp_path / ".plan"), whole, 1, "", left_out)
    assert plan.left_out == {"*.md": {"files": 1, "examples": [f"{tmp_path.name}/c.md"]}}
    assert read_plan(str(tmp_path / ".plan")) == plan


def test_seen_files_are_known_by_name_and_version(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    plan = write_plan(str(tmp_path / "plan"), parts(1, tmp_path / "*.txt"), unit_bytes=1)
    seen = SeenFiles([plan])
    (tmp_path / "b.txt").write_text("another text")
    (tmp_path / "c.txt").write_text("c")
    a, b, c = list_inputs([f"{tmp_path}/*.txt"])
    assert [seen.is_known("", file) for file in (a, b, c)] == [True, False, False]
    assert [seen.is_changed("", file) for file in (a, b, c)] == [False, True, False]
    assert not seen.is_known("another source", a)
