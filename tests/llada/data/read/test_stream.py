"""llada/data/read/stream.py: damaged streams, and files that are read in pieces."""

import bz2
import gzip
import itertools
import json
import lzma
import random
from collections import Counter

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from llada.data.outcomes import Rejects
from llada.data.read import stream
from llada.data.read.formats import read_records
from llada.data.read.parts import InputFile, Part, ReadOptions


def lines(*records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = [f"{rng.getrandbits(24):x}" for _ in range(2000)]
    return [f"{i} " + " ".join(rng.choices(words, k=40)) for i in range(count)]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_truncated_file_loses_only_its_end(tmp_path, read, suffix):
    data = lines(*({"text": f"{i} " * 200} for i in range(500)))
    whole = PACK[suffix](data)
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(whole[: len(whole) * 9 // 10])
    texts, rejects = read(path)
    assert texts == [f"{i} " * 200 for i in range(len(texts))]
    assert len(texts) > 50
    assert dict(rejects.counts) == {"truncated_file": 1}
    assert rejects.examples[0]["source"] == str(path)


def test_a_compressed_file_that_is_none(tmp_path, read):
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"not compressed at all\n")
        texts, rejects = read(tmp_path / name)
        assert not texts
        assert dict(rejects.counts) == {"damaged_file": 1}


@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_one_flipped_byte_costs_what_a_cut_costs_and_what_may_be_altered_is_counted(tmp_path, read, suffix):
    texts = sentences(600)
    whole = PACK[suffix](lines(*({"text": text} for text in texts)))
    path = tmp_path / f"a.jsonl.{suffix}"
    rng = random.Random(1)
    for at in range(20, len(whole), len(whole) // 30):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        found, rejects = read(path)
        path.write_bytes(whole[:at])
        sound = set(found) & set(texts)
        assert len(sound) >= len(read(path)[0]) - 3
        (fault,) = (fault for fault in rejects.faults if fault["reason"] == "damaged_file")
        assert fault["file"] == str(path)
        assert len(set(found) - sound) <= fault["doubtful"] <= 600


@pytest.mark.parametrize("suffix", PACK)
def test_of_three_members_the_sound_ones_are_read(tmp_path, read, suffix):
    texts = sentences(600)
    members = [
        bytearray(PACK[suffix](lines(*({"text": text} for text in texts[start : start + 200]))))
        for start in (0, 200, 400)
    ]
    members[0][20:40] = bytes(20)
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(b"".join(members))
    found, rejects = read(path)
    assert found[-400:] == texts[200:]
    assert dict(rejects.counts - Counter(invalid_json=200, not_utf8=200)) == {"damaged_file": 1}


def test_a_text_behind_damage_is_given_only_when_its_beginning_is_known(tmp_path, read):
    """The second member begins inside a record that began in the first."""
    data = lines({"text": "a"}, {"text": "b {"}, {"text": "c"})
    first = bytearray(gzip.compress(data[:20]))
    first[12:16] = bytes(4)
    (tmp_path / "a.jsonl.gz").write_bytes(bytes(first) + gzip.compress(data[20:]))
    texts, rejects = read(tmp_path / "a.jsonl.gz")
    assert texts == ["c"]
    assert dict(rejects.counts) == {"damaged_file": 1}
    (tmp_path / "a.txt.gz").write_bytes(bytes(first) + gzip.compress(b"tail of a<|endoftext|>a whole one"))
    assert read(tmp_path / "a.txt.gz")[0] == ["a whole one"]


def test_an_array_goes_on_behind_a_damaged_member(tmp_path, read):
    texts = sentences(300)
    data = json.dumps([{"text": text} for text in texts], indent=1).encode()
    thirds = [data.index(texts[at].encode()) for at in (0, 100, 200)]
    members = [gzip.compress(data[a:b]) for a, b in itertools.pairwise([0, *thirds[1:], None])]
    damaged = bytearray(members[1])
    damaged[2000:2020] = bytes(20)
    path = tmp_path / "a.json.gz"
    path.write_bytes(members[0] + bytes(damaged) + members[2])
    found, rejects = read(path)
    assert found[:100] == texts[:100]
    assert found[-99:] == texts[-99:]
    assert rejects.counts["damaged_file"] == 1
    assert "what was read before may be altered" in rejects.file_problems()[str(path)]


def test_a_wrong_checksum_says_how_many_records_may_be_altered(tmp_path, read):
    texts = sentences(90)
    members = [gzip.compress(lines(*({"text": t} for t in texts[i : i + 30]))) for i in (0, 30, 60)]
    members[1] = members[1][:-6] + b"\0" + members[1][-5:]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"".join(members))
    found, rejects = read(path)
    assert found == texts
    assert dict(rejects.counts) == {"damaged_file": 1}
    (fault,) = rejects.faults
    assert (fault["lost"], fault["doubtful"]) == (1, 30)
    assert "incorrect data check" in fault["why"]


def test_what_stands_behind_the_last_member(tmp_path, read):
    whole = gzip.compress(b'{"text": "a"}')  # without a line break at its end
    path = tmp_path / "a.jsonl.gz"
    for behind, counts in ((bytes(5000), {}), (b"\xff" * 50, {"trailing_garbage": 1})):
        path.write_bytes(whole + behind)
        texts, rejects = read(path)
        assert texts == ["a"]
        assert dict(rejects.counts) == counts
    for name, counts in (("a.jsonl.gz", {"empty_file": 1}), ("a.jsonl", {})):
        (tmp_path / name).write_bytes(b"")
        rejects = Rejects()
        part = Part(InputFile(str(tmp_path / name), name, 0, ""), 0)
        assert not list(read_records(part, rejects))
        assert dict(rejects.counts) == counts


WORDS = "Ünïcode, Ж中文 end"


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-16", WORDS), ("utf-16-le", WORDS), ("utf-16-be", WORDS), ("utf-32", WORDS), ("utf-8-sig", WORDS),
        ("utf-7", WORDS), ("gb18030", WORDS), ("latin-1", "Ünïcode"), ("cp1251", "Жар"), ("shift_jis", "表示"),
        ("iso2022_jp", "日本語"), ("cp500", "EBCDIC"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.csv", "a.json"])
def test_encodings(tmp_path, encoding, text, name):
    texts = [f"{text} {i}" for i in range(300)]
    if name == "a.csv":
        data = ("id,text\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(texts))).encode(encoding)
    elif name == "a.json":
        data = json.dumps([{"text": t} for t in texts], ensure_ascii=False).encode(encoding)
    elif "jsonl" in name:
        data = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode(encoding)
    else:
        data = "<|endoftext|>".join(texts).encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    file, rejects, found = InputFile(str(path), name, len(data), ""), Rejects(), []
    borders = [0, None] if name != "a.jsonl" else [0, 1000, 1001, 5000, None]
    for start, end in itertools.pairwise(borders):
        options = ReadOptions(encoding=encoding)
        found += [r.fields["text"] for r in read_records(Part(file, 1, start, end), rejects, options)]
    assert found == texts
    assert not rejects.counts


def test_what_an_encoding_does_not_know_costs_its_own_record(tmp_path, read):
    path = tmp_path / "a.jsonl"
    bad = '{"text": "x'.encode("utf-16-le") + b"\x00\xdc" + '"}\n'.encode("utf-16-le")
    data = [line.encode("utf-16-le") for line in ('{"text": "a"}\n', '{"text": "b"}\n')]
    path.write_bytes(data[0] + bad + data[1])
    texts, rejects = read(path, encoding="utf-16-le")
    assert texts == ["a", "b"]
    assert dict(rejects.counts) == {"undecodable": 1}
    path.write_bytes(b'{"text": "a"}\n{"text": "\x81\x8d"}\n{"text": "b"}\n')
    texts, rejects = read(path, encoding="cp1252")
    assert texts == ["a", "b"]
    assert dict(rejects.counts) == {"undecodable": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.json", "a.csv"])
def test_utf_16_without_being_told_is_answered_with_the_setting(tmp_path, read, name):
    data = '{"text": "a"}\n'.encode("utf-16")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    texts, rejects = read(tmp_path / name)
    assert not texts
    assert dict(rejects.counts) == {"not_utf8": 1}
    assert "set read.encoding to utf-16" in rejects.faults[0]["why"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json", "a.csv"])
def test_wide_encodings_need_a_mark_or_their_order(tmp_path, read, name):
    data = '[{"text": "a"}]' if name == "a.json" else '{"text": "a"}\n'
    for encoding, kind in (("utf-16-le", "utf-16"), ("utf-32-be", "utf-32")):
        (tmp_path / name).write_bytes(data.encode(encoding))
        texts, rejects = read(tmp_path / name, encoding=kind)
        assert (texts, dict(rejects.counts)) == ([], {"undecodable": 1})
        assert f"set read.encoding to {kind}-le or {kind}-be" in rejects.faults[0]["why"]
    (tmp_path / name).write_bytes(data.encode("utf-32"))
    assert "set read.encoding to utf-32" in read(tmp_path / name)[1].faults[0]["why"]


def test_utf_16_goes_on_behind_a_damaged_member(tmp_path, read):
    texts = sentences(90)
    written = [lines(*({"text": text} for text in texts[at : at + 30])).decode() for at in (0, 30, 60)]
    encodings = ("utf-16", "utf-16-le", "utf-16-le")  # one mark, at the beginning of the file
    members = [bytearray(gzip.compress(t.encode(e))) for t, e in zip(written, encodings, strict=True)]
    members[1][30:50] = bytes(20)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"".join(members))
    found, rejects = read(path, encoding="utf-16")
    assert (found[:30], found[-30:]) == (texts[:30], texts[60:])
    assert rejects.counts["damaged_file"] == 1


@pytest.mark.parametrize("encoding", ["gb18030", "big5", "shift_jis", "cp1251"])
def test_no_encoding_is_cut_inside_a_character(tmp_path, read, encoding):
    text = "ю" * 1000 if encoding == "cp1251" else "中" * 1000
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    texts, rejects = read(tmp_path / "a.txt", max_record_bytes=301, cuts_texts=True, encoding=encoding)
    assert "".join(texts) == text
    assert not rejects.counts


@pytest.mark.parametrize("ending", ["\n", "<|endoftext|>short"])
def test_a_text_that_is_too_large_comes_in_pieces_when_it_is_to_be_cut(tmp_path, read, monkeypatch, ending):
    monkeypatch.setattr(stream, "_READ_BYTES", 100)
    paragraphs = [f"paragraph {i} é " + "word " * (i % 7) for i in range(100)]
    whole = "\n\n".join(paragraphs)
    path = tmp_path / "a.txt"
    path.write_text(whole + ending)
    texts, rejects = read(path, max_record_bytes=300)
    assert rejects.counts["too_large"] == 1
    texts, rejects = read(path, max_record_bytes=300, cuts_texts=True)
    assert "".join(texts) == whole + ending.replace("<|endoftext|>", "")
    assert all(len(text.encode()) <= 300 for text in texts)
    assert all(text.startswith("paragraph") for text in texts[:-1])
    assert not rejects.counts
    path.write_text("é" * 1000)  # without a place to cut
    texts, rejects = read(path, max_record_bytes=301, cuts_texts=True)
    assert "".join(texts) == "é" * 1000
    assert not rejects.counts


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(st.text(st.sampled_from("ab\u00e9"), max_size=12), max_size=15),
    cuts=st.lists(st.integers(0, 200), max_size=4),
    ends_with_newline=st.booleans(),
    buffer=st.integers(1, 40),
)
def test_pieces_of_a_file_hold_every_record_once(tmp_path_factory, records, cuts, ends_with_newline, buffer):
    """Wherever a file is cut, and however it arrives in the buffer, no line is lost or read twice."""
    path = tmp_path_factory.mktemp("pieces") / "a.jsonl"
    data = lines(*({"text": "x" + text} for text in records))
    path.write_bytes(data if ends_with_newline else data.rstrip(b"\n"))
    file = InputFile(str(path), "a.jsonl", len(data), "")
    borders = [0, *sorted(cuts), None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_READ_BYTES", buffer)
        rejects, found = Rejects(), []
        for start, end in itertools.pairwise(borders):
            part = Part(file, 1, start, end)
            found += [r.fields["text"] for r in read_records(part, rejects, ReadOptions(max_record_bytes=40))]
    sizes = [len(json.dumps({"text": "x" + text})) for text in records]
    assert found == ["x" + text for text, size in zip(records, sizes, strict=True) if size <= 40]
    assert rejects.counts["too_large"] == sum(size > 40 for size in sizes)
