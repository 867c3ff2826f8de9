"""llada/data/read/compression.py"""

import gzip
import zlib

import pytest
import zstandard

from llada.data.read.compression import decompressor, is_damage, split_compression


@pytest.mark.parametrize(
    ("url", "stem", "compression"),
    [
        ("s3://b/A.JSONL.GZ", "s3://b/a.jsonl", "gzip"),
        ("a.txt.zst", "a.txt", "zstd"),
        ("a.txt", "a.txt", None),
        ("a.gz/b", "a.gz/b", None),
    ],
)
def test_the_name_says_the_compression(url, stem, compression):
    assert split_compression(url) == (stem, compression)


@pytest.mark.parametrize(("compression", "pack"), [("gzip", gzip.compress), ("zstd", zstandard.compress)])
def test_one_member_at_a_time(compression, pack):
    member = decompressor(compression)
    assert member.decompress(pack(b"one") + pack(b"two")) == b"one"
    assert member.eof
    assert member.unused_data == pack(b"two")
    with pytest.raises((zlib.error, zstandard.ZstdError)) as raised:
        decompressor(compression).decompress(b"not compressed at all")
    assert is_damage(raised.value)
    assert not is_damage(ValueError())
