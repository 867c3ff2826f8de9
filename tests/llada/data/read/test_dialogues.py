"""llada/data/read/dialogues.py: the four shapes of dialogues, and records that are none."""

import gzip
import json

import pytest

from llada.data.document import prompt_answer_pairs
from llada.data.outcomes import Rejects
from llada.data.read.dialogues import RecordError, parse_dialogue, read_dialogues
from llada.data.read.listing import list_inputs
from llada.data.read.parts import Part, ReadOptions


def read(folder, *records):
    """(dialogues, why the others are none)."""
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (file,) = list_inputs([str(path)])
    rejects = Rejects()
    return list(read_dialogues(Part(file, file.size), rejects, ReadOptions())), dict(rejects.counts)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"prompt": "q", "response": "a"},
        {"question": "q", "answer": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
)
def test_four_formats(record):
    assert prompt_answer_pairs(parse_dialogue(record)) == [([{"role": "user", "content": "q"}], "a")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "x"}, "unknown_sft_format"),
        ({"messages": []}, "no_messages"),
        ({"messages": "hello"}, "no_messages"),
        ({"messages": ["hello"]}, "message_not_an_object"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown_role"),
        ({"messages": [{"content": "x"}]}, "unknown_role"),
        ({"prompt": "q", "response": None}, "null_text"),
        ({"prompt": "q", "response": 4}, "text_not_a_string"),
        ({"prompt": "", "response": "x"}, "empty_text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no_answer"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no_answer"),
    ],
)
def test_bad_records(tmp_path, record, reason):
    assert read(tmp_path, record) == ([], {reason: 1})


def test_a_dialogue_is_a_document_with_clean_messages(tmp_path):
    messages = [
        {"role": "user", "content": "a\r\nb  \n"},
        {"role": "assistant", "content": "c\u00a0d", "id": 5},
    ]
    ((document,), reasons) = read(tmp_path, {"messages": messages})
    assert document.messages == (
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c d"},
    )
    assert document.text == "user: a\nb\nassistant: c d"
    assert document.size == len("a\nb") + len("c d")
    assert reasons == {}


def test_a_prompt_without_an_answer_is_a_dialogue_for_inference():
    assert parse_dialogue({"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(RecordError, match=r"^unknown_role$"):
        parse_dialogue({"messages": [{"role": "robot", "content": "x"}]})


def test_the_development_data(shared_dir):
    folder = shared_dir / "data/sft"
    turns = [json.loads(line) for line in (folder / "multiturn_500.jsonl").open()]
    assert sum(len(prompt_answer_pairs(parse_dialogue(r))) for r in turns) == 167 + 2 * 166 + 3 * 167
    with gzip.open(folder / "gsm8k_train.jsonl.gz") as stream:
        assert all(len(prompt_answer_pairs(parse_dialogue(json.loads(line)))) == 1 for line in stream)
