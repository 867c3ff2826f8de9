"""llada/data/read/parts.py"""

import pytest

from llada.data.read.parts import InputFile, Part

FILE = InputFile("s3://b/a.jsonl", "a.jsonl", 100, "tag")


@pytest.mark.parametrize(
    ("start", "end", "label"),
    [
        (0, None, "s3://b/a.jsonl"),
        (0, 50, "s3://b/a.jsonl#0-50"),
        (50, None, "s3://b/a.jsonl#50-"),
        (50, 99, "s3://b/a.jsonl#50-99"),
    ],
)
def test_a_piece_is_named_by_its_bytes(start, end, label):
    assert Part(FILE, 50, start, end).label == label
