"""llada/data/read/listing.py: which files, in which order, under which names; on disk and on a real S3 server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada.data.read import listing
from llada.data.read.listing import list_inputs
from llada.errors import UserError
from llada.files import write_bytes


def names(*inputs):
    return [file.name for file in list_inputs([str(i) for i in inputs])]


@pytest.fixture
def folder(tmp_path):
    for name in (
        "b/2.jsonl",
        "b/1.txt",
        "b/README.md",
        "b/_hidden.jsonl",
        "b/.x/3.jsonl",
        "a.parquet",
        "c.csv",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x" * len(name))
    return tmp_path


def test_folders_globs_files_and_lists(folder):
    assert names(folder / "b") == ["b/1.txt", "b/2.jsonl"]
    assert names(folder / "b/*.jsonl", folder / "a.parquet") == ["b/2.jsonl", "a.parquet"]
    (folder / "list.txt").write_text(f"# comment\n{folder}/b/2.jsonl\n\n{folder}/a.parquet\n")
    listed = list(list_inputs([f"@{folder}/list.txt"]))
    assert [file.url for file in listed] == [f"{folder}/b/2.jsonl", f"{folder}/a.parquet"]
    assert [file.size for file in listed] == [9, 9]
    assert len(names(f"@{folder}/list.txt", folder / "b", f"@{folder}/list.txt")) == 3


@given(st.lists(st.integers(0, 40), max_size=200))
def test_marks_are_a_set(numbers):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "_NEWEST_MARKS", 4)
        marks, seen = listing._Marks(), set()
        for number in numbers:
            assert marks.add(number << 58) == (number not in seen)
            seen.add(number)
        lengths = [len(array) for array in marks._sorted]
        assert lengths == sorted(lengths, reverse=True)  # few arrays: each lookup asks them all


def test_a_file_that_two_inputs_name_comes_once(folder):
    assert names(folder / "b/1.txt", folder / "b") == ["1.txt", "b/2.jsonl"]
    assert names(folder / "b", folder / "b/*.txt", folder / "a.parquet") == [
        "b/1.txt",
        "b/2.jsonl",
        "a.parquet",
    ]


def test_a_folders_files_come_by_path_whatever_its_depth(tmp_path):
    """The order of S3: "a-b/" before "a/", because "-" is before "/"."""
    paths = ["a-b/1.txt", "a.txt", "a/1.txt", "a/2/3.txt", "a/2.txt", "ab.txt", "b/c/d/e.txt"]
    for path in reversed(paths):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    assert names(tmp_path) == [f"{tmp_path.name}/{path}" for path in sorted(paths)]


def test_a_name_survives_a_move_and_new_files_beside_it(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place / "corpus/x").mkdir(parents=True)
        (tmp_path / place / "corpus/x/1.txt").write_text(place)
    here, there = (tmp_path / place / "corpus" for place in ("here", "there"))
    assert names(here) == names(there) == ["corpus/x/1.txt"]
    (here / "x/0.txt").write_text("new")
    assert names(here) == ["corpus/x/0.txt", "corpus/x/1.txt"]
    assert names(here, there)[:2] == names(here)
    assert names(tmp_path / "here", here / "x")[-1:] != ["x/1.txt"]  # named once, whoever comes first
    same = [here / "x/1.txt", there / "x/1.txt"]
    assert names(*same) == ["1.txt", "1.txt#2"]


def test_identity_changes_with_the_file(tmp_path):
    import os

    file = tmp_path / "a.txt"
    file.write_text("one")
    os.utime(file, (1, 1))
    (before,) = list_inputs([str(file)])
    file.write_text("two")
    (after,) = list_inputs([str(file)])
    assert before.identity != after.identity


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("none.txt", "no such file"),
        ("none*.txt", r"nothing to read in .*none\*\.txt"),
        ("c.csv", r"must end in one of \.jsonl"),
        ("c*", "must end in"),
        ("b/.x", "nothing to read"),
    ],
)
def test_an_input_that_gives_nothing_is_named(folder, bad, message):
    (folder / "b/.x/3.jsonl").unlink()
    with pytest.raises(UserError, match=message):
        names(folder / bad)


def test_a_list_with_a_missing_file_names_both(folder):
    (folder / "list.txt").write_text(f"{folder}/nowhere.txt\n")
    with pytest.raises(UserError, match=r"nowhere\.txt, which .*list\.txt lists"):
        names(f"@{folder}/list.txt")
    with pytest.raises(UserError, match=r"no list at .*none\.txt"):
        names(f"@{folder}/none.txt")


@pytest.mark.integration
def test_s3_page_by_page(s3_url, monkeypatch):
    """More files than a page; a folder whose name begins like the one asked for is another one."""
    from llada.data.read import listing

    monkeypatch.setattr(listing, "_PAGE", 7)
    for number in range(20):
        write_bytes(f"{s3_url}/pages/{number:02d}/x.jsonl", b"{}")
    write_bytes(f"{s3_url}/pages-of-others/x.jsonl", b"{}")
    found = list(list_inputs([f"{s3_url}/pages"]))
    assert [file.name for file in found] == [f"pages/{number:02d}/x.jsonl" for number in range(20)]
    assert found[0].url == f"{s3_url}/pages/00/x.jsonl"
    assert len({file.identity for file in found}) == 1  # the ETag: equal bytes
    assert names(f"{s3_url}/pages/1*/x.jsonl") == [f"pages/1{number}/x.jsonl" for number in range(10)]
