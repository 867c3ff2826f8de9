"""llada/data/read/json_lines.py"""

import json


def test_bad_records_are_counted_and_kept_as_examples(tmp_path, read):
    bad = {
        "invalid_json": b'{"text": "x"',
        "not_utf8": b'{"text": "\xff"}',
        "null_text": b'{"text": null}',
        "missing_text": b'{"body": "x"}',
        "text_not_a_string": b'{"text": 5}',
        "empty_text": b'{"text": " \\n"}',
        "nul_character": b'{"text": "a\\u0000b\\u0000"}',
        "not_an_object": b'["text"]',
        "too_large": b'{"text": "' + b"x" * 500 + b'"}',
    }
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\n".join([b'{"text": "good"}', *bad.values(), b'{"text": "\\ud800"}', b'{"text": "last"}'])
    )
    texts, rejects = read(path, max_record_bytes=200)
    assert texts == ["good", "last"]
    assert dict(rejects.counts) == dict.fromkeys(bad, 1) | {"not_utf8": 2}
    assert [e["line"] for e in rejects.examples] == list(range(2, 12))
    assert all(e["source"] == str(path) and len(e["text"]) <= 200 for e in rejects.examples)
    json.dumps(rejects.examples, ensure_ascii=False).encode()  # can be written as it is
