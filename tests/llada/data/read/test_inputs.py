"""llada/data/read/inputs.py: what is found under the names of inputs (as files: test_listing.py)."""

from __future__ import annotations

import pytest

from llada.data.read.inputs import open_input, open_inputs
from llada.errors import UserError


def test_what_an_input_is(tmp_path):
    (tmp_path / "d[1]").mkdir()
    (tmp_path / "d[1]/a*.txt").write_text("x")
    kinds = {
        f"{tmp_path}/d[1]": ("folder", f"{tmp_path}/d[1]", ""),
        f"{tmp_path}/./d[1]//": ("folder", f"{tmp_path}/d[1]", ""),
        f"{tmp_path}/d[1]/a*.txt": ("file", f"{tmp_path}/d[1]/a*.txt", ""),
        f"{tmp_path}/d[1]/b*.txt": ("glob", f"{tmp_path}/d[1]", "b*.txt"),
        f"@{tmp_path}/list": ("list", f"{tmp_path}/list", ""),
    }
    for given, (kind, root, pattern) in kinds.items():
        found = open_input(given)
        assert (found.kind, found.root, found.pattern) == (kind, root, pattern)
    long = f"{tmp_path}/{{{','.join(f'part-{number:05d}' for number in range(100))}}}.txt"
    assert open_input(long).kind == "glob", "longer than a name may be"
    with pytest.raises(UserError, match=r"no input at .*none: no such file or folder"):
        open_input(f"{tmp_path}/none")


def test_labels_tell_equal_names_apart(tmp_path):
    for folder in ("a/x", "b/x", "c"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "c/x").write_text("x")
    given = [f"{tmp_path}/{name}" for name in ("a/x", "./a/x", "b/x", "c/x", "b/./x/", "c/*")]
    assert [entry.prefix for entry in open_inputs(given)] == ["x/", "x#2/", "x#3", "c/"]
    with pytest.raises(UserError, match="no --input given"):
        open_inputs([])
