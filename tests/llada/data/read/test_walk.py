"""llada/data/read/walk.py: what lies below a folder, in which order (S3: test_listing.py)."""

from __future__ import annotations

import fsspec

from llada.data.read.walk import walk


def entries(fs, root, is_wanted=lambda path: True):
    return [(path[len(root) + 1 :], kind) for path, kind, _ in walk(fs, root, is_wanted)]


def test_a_folder_on_disk(tmp_path):
    for path in ("a-b/1", "a/1", "a/x/2", "a.b", "skip/3"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "none").symlink_to(tmp_path / "nowhere")
    fs, root = fsspec.filesystem("file"), str(tmp_path)
    everything = [
        ("a-b/1", "file"),
        ("a.b", "file"),
        ("a/1", "file"),
        ("a/x/2", "file"),
        ("link", "link"),
        ("none", "broken link"),
    ]
    assert entries(fs, root, lambda path: not path.endswith("/skip")) == everything
    assert entries(fs, f"{root}/missing") == []


def test_another_file_system():
    fs = fsspec.filesystem("memory")
    for path in ("/walk/b", "/walk/a/1", "/walk/a-b/1"):
        fs.pipe_file(path, b"x")
    assert entries(fs, "/walk") == [("a-b/1", "file"), ("a/1", "file"), ("b", "file")]
