"""llada/data/read/listing.py: which files, in which order, under which names; on disk and on a real S3 server."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from llada.data.read import listing, walk
from llada.data.read.listing import is_as_listed, list_inputs
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
        "c.docx",
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


def test_every_compression_of_a_folder_is_read(tmp_path, read):
    packs = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    packs |= {".zst": zstandard.compress, ".zstd": zstandard.compress}
    for ending, pack in packs.items():
        (tmp_path / f"a.jsonl{ending}").write_bytes(pack(json.dumps({"text": f"of {ending}"}).encode()))
    left_out = {}
    found = list(list_inputs([str(tmp_path)], left_out=left_out))
    assert [file.name.partition("a.jsonl")[2] for file in found] == sorted(packs)
    assert left_out == {}
    assert [read(file.url)[0] for file in found] == [[f"of {ending}"] for ending in sorted(packs)]


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
        ("none*.txt", r"nothing to read in .*none\*\.txt: no file and no folder matches"),
        ("none/*.txt", r"nothing to read in .*none/\*\.txt: there is no folder .*none"),
        ("c.docx", r"must end in one of \.jsonl"),
        (
            "c*",
            r"nothing to read in .*c\*: left out \*\.docx 1 \(.*c\.docx\); file names must end in one of \.jsonl",
        ),
        ("b/.x", "nothing to read in .*: the folder is empty"),
        ("b/e*.jsonl", r"nothing to read in .*: left out empty 1 \(b/empty\.jsonl\)$"),
        ("b/x**y/a.txt", r"the pattern x\*\*y/a\.txt: .*'\*\*' can only be an entire path component"),
        ("b/broken.jsonl", r"no input at .*broken\.jsonl: a link that leads nowhere"),
        ("b/1.txt/x", "a file stands where its folder should be"),
    ],
)
def test_an_input_that_gives_nothing_is_named(folder, bad, message):
    (folder / "b/.x/3.jsonl").unlink()
    (folder / "b/empty.jsonl").touch()
    (folder / "b/broken.jsonl").symlink_to(folder / "nowhere.jsonl")
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
    monkeypatch.setattr(walk, "_PAGE", 7)
    for number in range(20):
        write_bytes(f"{s3_url}/pages/{number:02d}/x.jsonl", b"{}")
    write_bytes(f"{s3_url}/pages-of-others/x.jsonl", b"{}")
    found = list(list_inputs([f"{s3_url}/pages"]))
    assert [file.name for file in found] == [f"pages/{number:02d}/x.jsonl" for number in range(20)]
    assert found[0].url == f"{s3_url}/pages/00/x.jsonl"
    assert len({file.identity for file in found}) == 1  # the ETag: equal bytes
    assert names(f"{s3_url}/pages/1*/x.jsonl") == [f"pages/1{number}/x.jsonl" for number in range(10)]


# --- Names are data ----------------------------------------------------------------------------------------------------

NAMES = [
    "e1[x]/a.jsonl",
    "e1[x]/b::c.jsonl",
    "q?/a{1,2}.jsonl",
    "q?/a*.jsonl",
    "s/-lead.jsonl",
    "s/100% #1 é.jsonl",
    "s/t.parquet/part-0.jsonl",
    "s/x y.jsonl",
    "zip::x/a.jsonl",
]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.integration)])
def place(request, tmp_path):
    """A folder that holds a file under each of NAMES: its URL."""
    url = str(tmp_path / "named")
    if request.param == "s3":
        url = f"{request.getfixturevalue('s3_url')}/{tmp_path.name}/named"
    for name in NAMES:
        write_bytes(f"{url}/{name}", b"{}")
    return url


def test_a_name_that_is_there_means_itself(place):
    assert names(place) == [f"named/{name}" for name in sorted(NAMES)]
    for name in NAMES:
        (file,) = list_inputs([f"{place}/{name}"])
        assert (file.url, file.name) == (f"{place}/{name}", name.rpartition("/")[2])
        assert is_as_listed(file)
    assert names(f"{place}/e1[x]") == names(f"{place}/e1[x]/") == names(f"{place}/e1[x]/*.jsonl")
    assert names(f"{place}/e1[x]") == ["e1[x]/a.jsonl", "e1[x]/b::c.jsonl"]
    assert names(f"{place}/q?") == ["q?/a*.jsonl", "q?/a{1,2}.jsonl"]
    assert names(f"{place}/q?/a{{1,2}}.jsonl") == ["a{1,2}.jsonl"]
    assert names(f"{place}/*/a{{1,2}}.jsonl") == ["named/q?/a{1,2}.jsonl"]
    assert names(f"{place}/zip::x") == ["zip::x/a.jsonl"]


def test_patterns(place):
    assert names(f"{place}/{{e1[[]x[]],s}}/{{a,-lead}}.jsonl") == [
        "named/e1[x]/a.jsonl",
        "named/s/-lead.jsonl",
    ]
    assert names(f"{place}/s/*") == [
        "s/-lead.jsonl",
        "s/100% #1 é.jsonl",
        "s/t.parquet/part-0.jsonl",
        "s/x y.jsonl",
    ]
    assert names(f"{place}/s/*.parquet") == ["s/t.parquet/part-0.jsonl"]
    assert names(f"{place}/s/t.parquet") == ["t.parquet/part-0.jsonl"]
    assert names(f"{place}/**/part-?.jsonl") == ["named/s/t.parquet/part-0.jsonl"]
    with pytest.raises(UserError, match=r"nothing to read in .*e1\[y\]: no file and no folder matches"):
        names(f"{place}/e1[y]")


def test_a_file_comes_once_whatever_its_spelling(tmp_path, monkeypatch):
    (tmp_path / "d/s").mkdir(parents=True)
    file = tmp_path / "d/s/x.jsonl"
    file.write_text("{}")
    (tmp_path / "d/link").symlink_to(tmp_path / "d/s")
    (tmp_path / "link.jsonl").symlink_to(file)
    spellings = [
        file,
        f"{tmp_path}/./d//s/x.jsonl",
        f"{tmp_path}/d/s/../s/x.jsonl/",
        f"file://{file}",
        "d/s/x.jsonl",
        "./d/s/x.jsonl",
        tmp_path / "link.jsonl",
        tmp_path / "d/s",
        f"{tmp_path}/d/link/",
        tmp_path / "d",
        ".",
        f"{tmp_path}/d/*",
        f"{tmp_path}/*/s",
    ]
    monkeypatch.chdir(tmp_path)
    (listed,) = list_inputs([str(spelling) for spelling in spellings])
    assert listed.url == str(file)
    for spelling in spellings:
        assert len(names(spelling, file)) == len(names(file, spelling)) == 1, spelling


def test_links_are_followed_once(tmp_path):
    """Whatever circles they make; what has a place of its own among the input keeps that place's name."""
    for path in ("in/b/1.jsonl", "in/.store/3.jsonl", "out/2.jsonl", "out/sub/4.jsonl", "out/README.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("{}")
    for link, target in {
        "in/a": "in/b",
        "in/a.jsonl": "in/b/1.jsonl",
        "in/c": "out",
        "in/d": "out",
        "in/hidden": "in/.store",
        "in/z.jsonl": "out/2.jsonl",
        "in/b/up": "in",
        "out/back": "in",
        "out/sub/round": "out",
        "in/self": "in/self",
    }.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    left_out = {}
    found = list(list_inputs([str(tmp_path / "in")], left_out=left_out))
    assert [file.name for file in found] == [
        "in/b/1.jsonl",
        "in/c/2.jsonl",
        "in/c/sub/4.jsonl",
        "in/hidden/3.jsonl",
    ]
    assert all(map(is_as_listed, found)), "a link's own time is not that of the file"
    assert left_out == {
        "hidden": {"files": 1, "examples": ["in/.store/"]},
        "broken link": {"files": 1, "examples": ["in/self"]},
        "*.md": {"files": 1, "examples": ["in/c/README.md"]},
    }
    assert names(f"{tmp_path}/in/*/*.jsonl") == ["in/b/1.jsonl", "in/c/2.jsonl", "in/hidden/3.jsonl"]
    (tmp_path / "links").mkdir()
    (tmp_path / "links/only").symlink_to(tmp_path / "out/sub")
    assert names(tmp_path / "links")[0] == "links/only/4.jsonl"


def test_what_is_not_read_is_counted_and_named(place, tmp_path):
    for name, data in {
        "s/README.md": b"x",
        "s/b.jsonl.lz4": b"x",
        "s/.git/objects/x.jsonl": b"x",
        "s/.git/config": b"x",
        "s/t.parquet/_SUCCESS": b"",
        "s/empty.jsonl": b"",
        "s/t.parquet/damaged.jsonl.gz": b"",
        "s/a.tar.gz": b"x",
        "s/a.jsonl.sha256": b"x",
        "s/part-00000": b"x",
    }.items():
        write_bytes(f"{place}/{name}", data)
    left_out = {}
    assert len(list(list_inputs([f"{place}/s", f"{place}/s/t.parquet"], left_out=left_out))) == 5
    assert {reason: (entry["files"], entry["examples"]) for reason, entry in left_out.items()} == {
        "hidden": (2, ["s/.git/", "s/t.parquet/_SUCCESS"]),
        "*.md": (1, ["s/README.md"]),
        "*.jsonl.lz4": (1, ["s/b.jsonl.lz4"]),
        "*.tar.gz": (1, ["s/a.tar.gz"]),
        "*.jsonl.sha256": (1, ["s/a.jsonl.sha256"]),
        "empty": (1, ["s/empty.jsonl"]),
        "no suffix": (1, ["s/part-00000"]),
    }
    asked_for = {}
    assert len(list(list_inputs([f"{place}/s/[!e]*.jsonl"], left_out=asked_for))) == 3
    assert asked_for == {}, "what a glob does not ask for is not left out"
    assert names(f"{place}/s/.git/*/*.jsonl") == [".git/objects/x.jsonl"], "asked for by its name"


def test_an_empty_file_that_is_named_is_read_and_told(tmp_path):
    (tmp_path / "a.jsonl").touch()
    left_out = {}
    (file,) = list_inputs([str(tmp_path / "a.jsonl")], left_out=left_out)
    assert (file.size, left_out) == (0, {"empty": {"files": 1, "examples": ["a.jsonl"]}})


def test_what_is_no_file_and_what_has_no_name(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    os.mkfifo(tmp_path / "pipe.jsonl")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")).write_text("{}")
    (tmp_path / "two\nlines.jsonl").write_text("{}")
    left_out = {}
    assert len(list(list_inputs([str(tmp_path)], left_out=left_out))) == 2
    assert names(tmp_path / "two\nlines.jsonl") == ["two\nlines.jsonl"]
    assert names(f"{tmp_path}/two?lines.*") == [f"{tmp_path.name}/two\nlines.jsonl"]
    assert {reason: entry["files"] for reason, entry in left_out.items()} == {
        "not a regular file": 1,
        "name that is not UTF-8": 1,
    }
    assert left_out["name that is not UTF-8"]["examples"] == [f"{tmp_path.name}/\\udcff.jsonl"]
    with pytest.raises(UserError, match=r"pipe\.jsonl: it is neither a file nor a folder"):
        names(tmp_path / "pipe.jsonl")


def test_the_output_is_no_input(place):
    inside = f"{place}/s"
    left_out = {}
    found = list(list_inputs([place], written=[inside], left_out=left_out))
    assert [file.name for file in found] == [
        f"named/{name}" for name in sorted(NAMES) if not name.startswith("s/")
    ]
    assert left_out["the output itself"]["files"] == 1
    for url in (inside, f"{inside}/t.parquet", f"{inside}/-lead.jsonl", f"{inside}/*"):
        with pytest.raises(UserError, match="it lies in the output; choose another --output"):
            list(list_inputs([url], written=[inside + "/"]))
    assert len(list(list_inputs([place], written=[f"{place}/s/t"]))) == len(NAMES), (
        "a folder of a longer name"
    )


def test_lists(place, tmp_path, monkeypatch):
    lists = place.removesuffix("named") + "lists"
    write_bytes(f"{lists}/more.txt", f"{place}/q?/a*.jsonl\n../named/s/-lead.jsonl".encode())
    content = "\ufeff# a comment\r\n../named/s/t.parquet\r\n\r\n  ../named/e1[x]/*.jsonl\r\n@more.txt\r\n"
    write_bytes(f"{lists}/list.txt", content.encode())
    monkeypatch.chdir(tmp_path)
    expected = [
        "s/t.parquet/part-0.jsonl",
        "e1[x]/a.jsonl",
        "e1[x]/b::c.jsonl",
        "q?/a*.jsonl",
        "s/-lead.jsonl",
    ]
    found = list(list_inputs([f"@{lists}/list.txt"]))
    assert [file.url for file in found] == [f"{place}/{name}" for name in expected]
    assert [file.name for file in found] == [
        f"{place if name.startswith('q') else '../named'}/{name}" for name in expected
    ]
    assert len({file.name for file in found}) == len(found)
    write_bytes(f"{lists}/elsewhere/list.txt", b"../../named/s/-lead.jsonl\nmissing.txt")
    with pytest.raises(UserError, match=r"no input at .*elsewhere/missing\.txt, which .*list\.txt lists"):
        names(f"@{lists}/list.txt", f"@{lists}/elsewhere/list.txt")


def test_a_list_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/list.txt").write_text("~/a.txt\n")
    assert [file.url for file in list_inputs([f"@{tmp_path}/lists/list.txt"])] == [f"{tmp_path}/a.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"@a.txt\n", r"a\.txt, which .*a\.txt lists: the list names itself"),
        (b"@b.txt\n", r"no list at .*b\.txt, which .*a\.txt lists"),
        (b"# nothing\n\n", r"nothing to read in .*a\.txt: the list names no file"),
        (
            b"x*.jsonl\n",
            r"nothing to read in .*/x\*\.jsonl, which .*a\.txt lists: no file and no folder matches",
        ),
        (
            b"e*.txt\n",
            r"nothing to read in .*/e\*\.txt, which .*a\.txt lists: left out empty 1 \(e\.txt\)$",
        ),
        (b"a.pdf", r"cannot read .*a\.pdf: the file name must end in"),
        ("é.txt".encode("utf-16"), r"the list .*a\.txt is not UTF-8 text"),
    ],
)
def test_a_list_that_cannot_be_followed(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "a.pdf").write_bytes(b"x")
    (tmp_path / "e.txt").touch()
    with pytest.raises(UserError, match=message):
        names(f"@{tmp_path}/a.txt")
    with pytest.raises(UserError, match="that is a folder; give a file"):
        names(f"@{tmp_path}")
