"""llada/data/read/globs.py: what a pattern matches, and where it begins."""

from __future__ import annotations

import pytest
from fsspec.implementations.local import LocalFileSystem

from llada.data.read.globs import compile_pattern, is_pattern, split_pattern
from llada.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("*.txt", ["a.txt", "b c.txt", "x.txt/y/z"], ["a/b.txt", "a.txt2"]),
        ("a?.txt", ["ab.txt"], ["a.txt", "a/.txt"]),
        ("[ab].txt", ["a.txt", "[ab].txt"], ["c.txt", "ab.txt"]),
        ("{a,b*}.{txt,md}", ["a.txt", "bc.md", "{a,b*}.{txt,md}"], ["c.txt", "a.pdf"]),
        ("{a,{b,c}}", ["a", "b", "c"], ["d"]),
        ("{a/b,c}/x", ["a/b/x", "c/x"], ["a/x"]),
        ("**/x", ["x", "a/x", "a/b/x/y"], ["ax"]),
        ("a/*", ["a/b", "a/b/c"], ["a"]),
        ("a{1}.txt", ["a{1}.txt"], ["a1.txt"]),
    ],
)
def test_what_matches(pattern, matching, others):
    compiled = compile_pattern(pattern)
    assert [name for name in matching + others if compiled.fullmatch(name)] == matching


def test_what_is_a_pattern():
    assert all(map(is_pattern, ["*", "a?", "[a]", "{a,b}", "x/{a,b}/c"]))
    assert not any(map(is_pattern, ["a", "a]", "{a}", "a,b", "}a,b{"]))


def test_a_folder_that_is_there_is_no_pattern(tmp_path):
    (tmp_path / "e[1]/f{a,b}").mkdir(parents=True)
    fs, root = LocalFileSystem(), str(tmp_path)
    assert split_pattern(fs, f"{root}/*.txt") == (root, "*.txt")
    assert split_pattern(fs, f"{root}/e[1]/*.txt") == (f"{root}/e[1]", "*.txt")
    assert split_pattern(fs, f"{root}/e[1]/f{{a,b}}/x?/y") == (f"{root}/e[1]/f{{a,b}}", "x?/y")
    assert split_pattern(fs, f"{root}/e[2]/f{{a,b}}/x") == (root, "e[2]/f{a,b}/x")
    assert split_pattern(fs, f"{root}/{{a/b,c}}/x") == (root, "{a/b,c}/x")


def test_a_pattern_that_means_nothing():
    with pytest.raises(UserError, match=r"the pattern a\*\*b: .* entire path component"):
        compile_pattern("a**b")
