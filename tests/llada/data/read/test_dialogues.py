"""llada/data/read/dialogues.py: dialogues in the forms in which people keep them, and records that are none."""

import gzip
import json

import pytest

from llada.data.document import prompt_answer_pairs
from llada.data.outcomes import Rejects
from llada.data.read.dialogues import RecordError, parse_dialogue, read_dialogues
from llada.data.read.listing import list_inputs
from llada.data.read.parts import Part, ReadOptions


def read(folder, *records, **options):
    """(dialogues, why the others are none)."""
    documents, rejects = read_all(folder, *records, **options)
    return documents, dict(rejects.counts)


def read_all(folder, *records, **options):
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (file,) = list_inputs([str(path)])
    rejects = Rejects()
    return list(read_dialogues(Part(file, file.size), rejects, ReadOptions(**options))), rejects


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(text, **more):
    return {"role": "tool", "content": text, **more}


def sent(who, text):
    return {"from": who, "value": text}


CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"at": "cat"}}}
CALL_AS_JSON = {**CALL, "function": {"name": "look", "arguments": '{"at": "cat"}'}}
PAIR = [user("q"), assistant("a")]


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": PAIR}, PAIR),
        ({"messages": json.dumps(PAIR), "id": 3}, PAIR),
        ({"conversations": PAIR}, PAIR),
        ({"conversation": [sent("Human", "q"), sent("chatgpt", "a")]}, PAIR),
        ({"conversations": [sent("human", "q"), sent("gpt", "a")]}, PAIR),
        ({"prompt": "q", "response": "a"}, PAIR),
        ({"prompt": "q", "completion": "a"}, PAIR),
        ({"question": "q", "answer": "a"}, PAIR),
        ({"instruction": "q", "response": "a"}, PAIR),
        ({"query": "q", "response": "a"}, PAIR),
        ({"input": "q", "output": "a"}, PAIR),
        ({"prompt": None, "question": "q", "response": None, "answer": "a", "messages": None}, PAIR),
        # Alpaca, dolly, SQuAD
        ({"instruction": "q", "input": "", "output": "a"}, PAIR),
        ({"instruction": "q", "input": None, "output": "a"}, PAIR),
        ({"instruction": "q", "input": "d", "context": "c", "output": "a"}, [user("q\n\nd\n\nc"), assistant("a")]),
        # A prompt that holds its input already, turns that hold all
        ({"prompt": "q", "instruction": "x", "input": "data", "response": "a"}, PAIR),
        ({"messages": PAIR, "input": "q", "output": "a"}, PAIR),
        ({"prompt": "q", "response": "a", "conversation": 7}, PAIR),
        ({"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]}, PAIR),
        ({"instruction": "q", "input": "data", "output": "a"}, [user("q\n\ndata"), assistant("a")]),
        ({"instruction": "", "input": "data", "output": "a"}, [user("data"), assistant("a")]),
        ({"instruction": "q", "context": "c", "response": "a"}, [user("q\n\nc"), assistant("a")]),
        ({"question": "q", "context": ["c", "d"], "answer": "a"}, [user("q\n\nc\n\nd"), assistant("a")]),
        ({"instruction": "q2", "history": [["q", "a"]], "output": "b"}, [*PAIR, user("q2"), assistant("b")]),
        # What is said beside the turns
        ({"system": "s", "messages": PAIR}, [system("s"), *PAIR]),
        ({"system": "s", "conversations": [system("t"), *PAIR]}, [system("s\n\nt"), *PAIR]),
        ({"system": "s", "messages": [system("s"), *PAIR]}, [system("s"), *PAIR]),
        ({"system_prompt": "s", "question": "q", "response": "a"}, [system("s"), *PAIR]),
        ({"system": "", "messages": [system(" "), *PAIR]}, PAIR),
        ({"context": "c", "messages": [*PAIR, *PAIR]}, [user("q\n\nc"), assistant("a"), *PAIR]),
        # A conversation as the prompt is no lesson
        (
            {"prompt": [*PAIR, user("r")], "completion": [assistant("b")]},
            [user("q"), assistant("a", trained=False), user("r"), assistant("b")],
        ),
        # OpenAI's and ShareGPT's roles, parts, calls
        (
            {"messages": [{"role": "developer", "content": "s"}, *PAIR, {"role": "function", "name": "f", "content": "1"}]},
            [system("s"), *PAIR, tool("1", name="f")],
        ),
        (
            {"messages": [user([{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]), assistant("a")]},
            [user("q!"), assistant("a")],
        ),
        (
            {
                "messages": [
                    user("q"),
                    assistant(None, tool_calls=[CALL_AS_JSON]),
                    tool("", tool_call_id="c1"),
                    assistant("a", tool_calls=None, name=None),
                ]
            },
            [user("q"), assistant("", tool_calls=[CALL]), tool("", tool_call_id="c1"), assistant("a")],
        ),
        (
            {"messages": [user("q"), assistant("a", reasoning_content="r", thinking="t", reasoning={"effort": 1})]},
            [user("q"), assistant("a", reasoning_content="r", thinking="t")],
        ),
        (
            {"messages": [user("q"), assistant(None, function_call={"name": "f", "arguments": "{}"})]},
            [
                user("q"),
                assistant("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}]),
            ],
        ),
        (
            {"conversations": [sent("human", "q"), sent("function_call", "{}"), sent("observation", "1"), sent("gpt", "a")]},
            [user("q"), assistant("{}"), tool("1"), assistant("a")],
        ),
        # What is not to be learned
        *(
            ({"messages": [user("q"), assistant("a", **flag), *PAIR]}, [user("q"), assistant("a", trained=False), *PAIR])
            for flag in ({"weight": 0}, {"weight": 0.0}, {"train": False}, {"mask": True}, {"loss": False, "weight": 1})
        ),
        ({"messages": [user("q"), assistant("a", weight=1, train=True, mask=0)]}, PAIR),
        ({"prompt": "q", "completion": "a", "loss": 2.5, "mask": "User"}, PAIR),
        ({"messages": PAIR, "weight": 1, "train": True, "loss": 2.5, "mask": "User"}, PAIR),
        ({"messages": [], "conversations": PAIR, "train": "True", "weight": "1"}, PAIR),
        ({"messages": [{"role": " User", "content": "q"}, assistant("a")]}, PAIR),
        ({"messages": PAIR, "system": [{"type": "text", "text": "s"}]}, [system("s"), *PAIR]),
        (
            {"messages": [user("q"), assistant("", tool_calls=[{"id": 1, "name": "f", "arguments": "{}"}])]},
            [
                user("q"),
                assistant("", tool_calls=[{"id": 1, "type": "function", "function": {"name": "f", "arguments": {}}}]),
            ],
        ),
        # A record's weight of 1 does not speak against a turn's of 0
        *(
            ({**record, "weight": 1}, [user("q"), assistant("a", trained=False), *PAIR])
            for record in (
                {"messages": [user("q"), assistant("a", weight=0), *PAIR]},
                {"prompt": "q", "completion": [assistant("a", train=False), *PAIR]},
            )
        ),
    ],
)  # fmt: skip
def test_dialogues_as_people_have_them(tmp_path, record, messages):
    ((document,), reasons) = read(tmp_path, record)
    assert list(document.messages) == messages
    assert reasons == {}
    assert parse_dialogue(record).messages == messages


def test_tools_are_passed_on(tmp_path):
    tools = [{"type": "function", "function": {"name": "look"}}]
    given = [tools, json.dumps(tools), json.dumps(tools[0]), tools[0]]
    documents, _ = read(
        tmp_path, *({"messages": PAIR, "tools": each} for each in given), {"messages": PAIR, "tools": ""}
    )
    assert [list(document.tools) for document in documents] == [tools, tools, tools, tools, []]


def test_fields_and_roles_of_other_names(tmp_path):
    record = {
        "turns": [{"who": "A", "said": "q"}, {"who": "B", "said": "a", "learn": 0}, {"who": "A", "said": "r"}]
    }
    record["turns"].append({"who": "assistant", "said": "b"})
    fields = {"messages": "turns", "role": "who", "content": "said", "weight": "learn"}
    ((document,), _) = read(tmp_path, record, chat_fields=fields, chat_roles={"A": "user", "B": "assistant"})
    assert list(document.messages) == [user("q"), assistant("a", trained=False), user("r"), assistant("b")]
    asked = {"ask": "q", "reply": "a", "about": "c", "persona": "s", "prompt": "other"}
    fields = {"prompt": "ask", "answer": "reply", "context": "about", "system": "persona"}
    ((document,), _) = read(tmp_path, asked, chat_fields=fields)
    assert list(document.messages) == [system("s"), user("q\n\nc"), assistant("a")]


@pytest.mark.parametrize(
    ("turns", "used", "edits"),
    [
        (
            [*PAIR, user("r"), assistant("")],
            [*PAIR, user("r"), assistant("", trained=False)],
            {"empty_text": 1},
        ),
        ([*PAIR, user("r"), assistant(None), *PAIR], None, {"null_text": 1}),
        ([*PAIR, {"role": "wizard", "content": "x"}, *PAIR], PAIR, {"unknown_role": 3}),
        ([*PAIR, user(7), assistant("x")], PAIR, {"text_not_a_string": 2}),
        (
            [*PAIR, user([{"type": "image_url", "image_url": {}}]), assistant("x")],
            PAIR,
            {"content_part_image_url": 2},
        ),
        ([*PAIR, user("r"), assistant("x", weight=0.5)], [*PAIR, user("r")], {"weight_neither_0_nor_1": 1}),
        ([*PAIR, user("r"), assistant("a\x00b\x00")], [*PAIR, user("r")], {"nul_character": 1}),
    ],
)
def test_one_bad_turn_costs_what_stands_behind_it(tmp_path, turns, used, edits):
    (document,), rejects = read_all(tmp_path, {"messages": turns})
    expected = used or [*PAIR, user("r"), assistant("", trained=False), *PAIR]
    assert list(document.messages) == expected
    assert not rejects.counts
    assert dict(rejects.edits) == {f"turns_left_out.{reason}": count for reason, count in edits.items()}
    with pytest.raises(RecordError, match=next(iter(edits))):
        parse_dialogue({"messages": turns})


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
        ({"messages": [user("q"), assistant("")]}, "empty_text"),
        ({"messages": [user("q"), assistant("a", weight=0)]}, "no_trained_answer"),
        ({"messages": [user("q"), assistant("a", weight=0.5)]}, "weight_neither_0_nor_1"),
        ({"prompt": "q", "response": "a", "weight": 2}, "weight_neither_0_nor_1"),
        ({"prompt": "q", "response": "a", "weight": 0}, "no_trained_answer"),
        ({"messages": [*PAIR, *PAIR], "weight": 0}, "no_trained_answer"),
        ({"messages": [user("q"), assistant("a", weight=1)], "train": False}, "no_trained_answer"),
        ({"conversations": PAIR, "mask": 1}, "no_trained_answer"),
        ({"messages": PAIR, "weight": 0.5}, "weight_neither_0_nor_1"),
        ({"messages": PAIR, "mask": [0, 1]}, "weight_neither_0_nor_1"),
        ({"messages": PAIR, "train": "false"}, "no_trained_answer"),
        ({"messages": PAIR, "context": [{"title": "t"}]}, "content_part_text"),
        ({"messages": [assistant("a", reasoning_content="\ud800")]}, "not_utf8"),
        ({"messages": [assistant("a", tool_calls=[{**CALL, "id": "\ud800"}])]}, "not_utf8"),
        ({"messages": PAIR, "tools": [{"name": "\ud800"}]}, "not_utf8"),
        ({"messages": [user("q"), assistant(None, tool_calls=[{"id": 1}])]}, "tool_call_without_a_function"),
        ({"messages": [user([{"type": "image_url", "image_url": {}}])]}, "content_part_image_url"),
        ({"question": "q", "answer": ["a", "b"]}, "content_part_str"),
        ({"messages": PAIR, "system": 3}, "system_text_not_a_string"),
        ({"messages": PAIR, "context": {"title": "t"}}, "context_text_not_a_string"),
        ({"messages": PAIR, "tools": "look"}, "tools_not_a_list"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "history_not_in_pairs"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "unknown_sft_format"),
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


def test_an_answer_without_visible_text_is_none(tmp_path):
    (document,), rejects = read_all(tmp_path, {"messages": [user("q"), assistant("\u00ad"), *PAIR]})
    assert list(document.messages) == [user("q"), assistant("", trained=False), *PAIR]
    assert dict(rejects.edits) == {"turns_left_out.empty_text": 1}


def test_a_prompt_without_an_answer_is_a_dialogue_for_inference():
    assert parse_dialogue({"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(RecordError, match=r"^unknown_role$"):
        parse_dialogue({"messages": [{"role": "robot", "content": "x"}]})


def test_the_development_data(shared_dir):
    folder = shared_dir / "data/sft"
    turns = [json.loads(line) for line in (folder / "multiturn_500.jsonl").open()]
    assert sum(len(prompt_answer_pairs(parse_dialogue(r).messages)) for r in turns) == 167 + 2 * 166 + 3 * 167
    with gzip.open(folder / "gsm8k_train.jsonl.gz") as stream:
        assert all(
            len(prompt_answer_pairs(parse_dialogue(json.loads(line)).messages)) == 1 for line in stream
        )
