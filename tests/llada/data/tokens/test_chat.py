import pytest

from llada.data.tokens import chat
from llada.tokenizer import encode_texts, render_chat, train_tokenizer

DIALOGUE = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": " 4 "},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["user assistant system hello"], 270)


def encode_example(tokenizer, history, answer, **options):
    return chat.encode_example(tokenizer, history, {"role": "assistant", "content": answer}, **options)


def test_an_example_is_prompt_answer_eot_eos(tokenizer):
    tokens, start, _ = encode_example(tokenizer, DIALOGUE[:4], " 4 ", row_length=500)
    assert tokens[:start] == render_chat(tokenizer, DIALOGUE[:4])
    assert tokens[start:] == [*encode_texts(tokenizer, ["4"])[0], 5, 0]


def test_an_example_that_just_fits(tokenizer):
    tokens, *_ = encode_example(tokenizer, DIALOGUE[:4], "4", row_length=500)
    for policy in ("drop", "truncate_prompt"):
        exact = encode_example(tokenizer, DIALOGUE[:4], "4", row_length=len(tokens), too_long=policy)
        assert exact[0] == tokens
    assert encode_example(tokenizer, DIALOGUE[:4], "4", row_length=len(tokens) - 1) == chat.TOO_LONG


def test_truncation_forgets_the_oldest_first(tokenizer):
    full, *_ = encode_example(tokenizer, DIALOGUE[:4], "4", row_length=500)
    tokens, start, _ = encode_example(
        tokenizer, DIALOGUE[:4], "4", row_length=len(full) - 1, too_long="truncate_prompt"
    )
    assert tokens[:start] == render_chat(tokenizer, [DIALOGUE[0], *DIALOGUE[2:4]])
    long = [{"role": "user", "content": "x" * 300 + "END"}]
    tokens, start, _ = encode_example(tokenizer, long, "4", row_length=100, too_long="truncate_prompt")
    assert len(tokens) == 100
    assert tokenizer.decode(tokens).startswith("<|startoftext|><|start_header_id|>user<|end_header_id|>x")
    assert "END<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>" in tokenizer.decode(
        tokens
    )


def test_an_answer_is_never_cut(tokenizer):
    long = encode_example(tokenizer, DIALOGUE[:2], "y" * 90, row_length=100, too_long="truncate_prompt")
    assert long == chat.TOO_LONG


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("    return x\n", "    return x"),
        ("\tif x:\n\t\ty", "\tif x:\n\t\ty"),
        ("\n \n  a\n  b ", "  a\n  b"),
        (" one", "one"),
        (" one\n two", "one\n two"),
        ("　　一", "　　一"),
    ],
)
def test_an_answer_keeps_its_first_indentation(tokenizer, answer, kept):
    tokens, start, _ = encode_example(tokenizer, DIALOGUE[:2], answer, row_length=500)
    assert tokens[start:-2] == encode_texts(tokenizer, [kept])[0]


def test_what_a_template_refuses_is_no_example():
    tokenizer = train_tokenizer(["user assistant system hello"], 270)
    tokenizer.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('users first. Always!') }}{% endif %}"
        + tokenizer.chat_template
    )
    assert (
        encode_example(tokenizer, DIALOGUE[:2], "4", row_length=500)
        == "refused_by_template: users first. Always!"
    )
    # Forgetting goes on to a history that the template takes.
    history = [*DIALOGUE[1:3], {"role": "user", "content": "2+2?" * 5}]
    whole, *_ = encode_example(tokenizer, history, "4", row_length=500)
    tokens, start, _ = encode_example(
        tokenizer, history, "4", row_length=len(whole) - 1, too_long="truncate_prompt"
    )
    assert tokens[:start] == render_chat(tokenizer, history[2:])
