"""llada/data/read/compression.py: members, padding, damage in every place, windows and dictionaries."""

import bz2
import gzip
import io
import lzma
import random
import struct

import pytest
import zstandard

from llada.data.read import compression
from llada.data.read.compression import COMPRESSIONS, SOUND, Damage, decompressed, split_compression


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


PACK = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstd}
EACH = pytest.mark.parametrize("name", PACK)


def text(seed: int, size: int = 60_000) -> bytes:
    rng = random.Random(seed)
    return b"".join(b"%x\n" % rng.getrandbits(rng.randrange(1, 200)) for _ in range(size // 25))


def content(data: bytes, name: str) -> tuple[bytes, list[str]]:
    """(all that is given, the reasons of what is not)."""
    given, reasons = b"", []
    for piece in decompressed(io.BytesIO(data), name):
        if isinstance(piece, Damage):
            reasons.append(piece.reason)
            given += piece.unproven
        elif piece is not SOUND:
            given += piece
    return given, reasons


@pytest.mark.parametrize(
    ("url", "stem", "found"),
    [
        ("s3://b/A.JSONL.GZ", "s3://b/a.jsonl", "gzip"),
        ("a.txt.zst", "a.txt", "zstd"),
        ("a.txt.zstd", "a.txt", "zstd"),
        ("a.csv.bz2", "a.csv", "bzip2"),
        ("a.warc.xz", "a.warc", "xz"),
        ("a.txt", "a.txt", None),
        ("a.gz/b", "a.gz/b", None),
    ],
)
def test_the_name_says_the_compression(url, stem, found):
    assert split_compression(url) == (stem, found)
    assert set(COMPRESSIONS.values()) == set(PACK)


@EACH
def test_members_one_after_the_other_and_what_stands_behind_them(name):
    first, second = text(1), text(2, 300_000)
    both = PACK[name](first) + PACK[name](b"") + PACK[name](second)
    assert content(both, name) == (first + second, [])
    assert list(decompressed(io.BytesIO(both), name)).count(SOUND) >= 3
    assert content(both + bytes(70_000), name) == (first + second, [])  # padding
    assert content(PACK[name](first) + bytes(512) + PACK[name](second), name) == (first + second, [])
    assert content(both + b"<html>garbage", name) == (first + second, ["trailing_garbage"])
    assert content(PACK[name](first) + b"junk" + PACK[name](second), name) == (
        first + second,
        ["damaged_file"],
    )


@EACH
def test_what_is_no_such_file_at_all(name):
    assert content(b"", name) == (b"", ["empty_file"])
    assert content(b"not compressed at all", name) == (b"", ["damaged_file"])
    assert content(bytes(100), name) == (b"", [])
    assert content(PACK[name](b"x")[:2], name) == (b"", ["truncated_file"])


@EACH
def test_a_cut_file_gives_what_stands_before_the_cut(name):
    whole = text(3, 400_000)
    data = PACK[name](whole)
    for cut in range(1, len(data), len(data) // 15):
        given, reasons = content(data[:cut], name)
        assert whole.startswith(given)
        assert reasons == ["truncated_file"]


@EACH
def test_a_flipped_byte_costs_no_more_than_a_cut_and_no_other_member(name):
    """Wherever it is: what stands before it is given, the members around it are, and it is never silent."""
    rng = random.Random(4)
    parts = [text(seed) for seed in (5, 6, 7)]
    members = [PACK[name](part) for part in parts]
    before, after = parts[0], parts[2]
    for at in range(4, len(members[1]), 397):
        damaged = bytearray(members[1])
        damaged[at] ^= 1 << rng.randrange(8)
        given, reasons = content(members[0] + bytes(damaged) + members[2], name)
        assert given.startswith(before)
        assert given.endswith(after)
        cut, _ = content(members[0] + members[1][:at], name)
        kept = given[: len(given) - len(after)]
        lost = len(cut) - len(kept)
        assert lost <= {"xz": 2000, "bzip2": len(parts[1]) if at > len(members[1]) - 80 else 0}.get(name, 0)
        if given != b"".join(parts):
            assert reasons[0] == "damaged_file"
            assert set(reasons) == {"damaged_file"}
        elif not reasons:  # a byte that says nothing of the content, such as gzip's time
            assert name in ("gzip", "bzip2")


@EACH
def test_a_damaged_beginning_does_not_hide_the_next_member(name):
    parts = [text(8), text(9)]
    damaged = bytearray(PACK[name](parts[0]))
    damaged[0] ^= 0xFF
    assert content(bytes(damaged) + PACK[name](parts[1]), name) == (parts[1], ["damaged_file"])


def test_a_wrong_checksum_leaves_what_it_checks_unproven():
    data = bytearray(gzip.compress(text(10)))
    data[-6] ^= 1
    pieces = list(decompressed(io.BytesIO(bytes(data)), "gzip"))
    assert SOUND not in pieces
    assert pieces[-1].reason == "damaged_file"
    assert "incorrect data check" in pieces[-1].detail


def test_bytes_that_only_look_like_a_member_give_nothing():
    data = gzip.compress(text(11)) + b"junk\x1f\x8b\x08\0\0\0\0\0\0\0junk" * 5 + gzip.compress(text(12))
    assert content(data, "gzip") == (text(11) + text(12), ["damaged_file"])


def test_a_damaged_member_that_is_larger_than_what_is_held(monkeypatch):
    monkeypatch.setattr(compression, "_HELD_BYTES", 10_000)
    monkeypatch.setattr(compression, "_READ_BYTES", 4096)
    members = [gzip.compress(text(seed, 200_000)) for seed in (13, 14, 15)]
    damaged = bytearray(members[1])
    damaged[len(damaged) // 2 : len(damaged) // 2 + 50] = bytes(50)
    given, reasons = content(members[0] + bytes(damaged) + members[2], "gzip")
    assert given.startswith(text(13, 200_000) + text(14, 200_000)[:50_000])
    assert given.endswith(text(15, 200_000))
    assert reasons == ["damaged_file"]


@pytest.mark.parametrize("window", [28, 30, 31])
def test_zstd_with_a_long_window(window):
    settings = zstandard.ZstdCompressionParameters(window_log=window, enable_ldm=True)
    packed = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    data = packed.compress(text(16)) + packed.flush()
    assert content(data, "zstd") == (text(16), [])


@pytest.mark.parametrize("is_packed", [False, True])
def test_zstd_with_its_dictionary_in_the_first_frame(is_packed):
    samples = [text(seed, 2000) for seed in range(100)]
    dictionary = zstandard.train_dictionary(4096, samples)
    stored = dictionary.as_bytes()
    stored = zstandard.compress(stored) if is_packed else stored
    packer = zstandard.ZstdCompressor(dict_data=dictionary)
    frames = struct.pack("<II", 0x184D2A5D, len(stored)) + stored + b"".join(map(packer.compress, samples))
    assert content(frames, "zstd") == (b"".join(samples), [])
    assert content(frames[:2000], "zstd")[1] == ["truncated_file"]
    broken = frames[:8] + b"\x28\xb5\x2f\xfdbroken" + frames[18:]
    assert content(broken, "zstd") == (b"", ["damaged_file"])


def test_zstd_frames_without_content_are_passed_over():
    skippable = struct.pack("<II", 0x184D2A53, 5) + b"hello"
    assert content(skippable + zstd(b"a") + skippable + zstd(b"b"), "zstd") == (b"ab", [])


@EACH
def test_no_bytes_raise(name):
    rng = random.Random(17)
    for _ in range(60):
        junk = rng.randbytes(rng.randrange(200))
        content(junk, name)
        given, _ = content(PACK[name](b"sound") + junk + PACK[name](b"end"), name)
        assert given.startswith(b"sound")
        assert given.endswith(b"end")
