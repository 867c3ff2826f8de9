"""Documents to the items of rows: order, EOS, and what is said of those that do not fit."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llada.data.document import Document, dialogue
from llada.data.outcomes import Report
from llada.data.tokens import encoding
from llada.data.tokens.encoding import Encoder, encode
from llada.tokenizer import encode_texts, ensure_special_tokens, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some text to learn from", "user assistant"], 300)


@pytest.mark.parametrize("batch_chars", [1, 12, 1 << 18])
def test_documents_come_in_order_and_closed(tokenizer, monkeypatch, batch_chars):
    monkeypatch.setattr(encoding, "ENCODED_CHARS", batch_chars)
    documents = [Document(f"text {number}") for number in range(20)]
    report = Report()
    encoded = list(encode(documents, Encoder(tokenizer, "pretrain", 32, "drop"), report))
    assert [document for document, _ in encoded] == documents
    for document, (tokens,) in encoded:
        assert tokens.tolist() == [*encode_texts(tokenizer, [document.text])[0], tokenizer.eos_token_id]
    assert report.documents("kept") == sum(report.histograms["tokens"].values()) == 20
    assert report.seconds["tokenise"] >= 0


def test_a_dialogue_without_a_fitting_example_is_refused(tokenizer):
    question = {"role": "user", "content": "q"}
    short, long = ({"role": "assistant", "content": text} for text in ("a", "text " * 100))
    report = Report()
    dialogues = [
        dialogue([question, short]),
        dialogue([question, long]),
        dialogue([question, short, question, long]),
    ]
    encoded = list(encode(dialogues, Encoder(tokenizer, "sft", 64, "drop"), report))
    assert [len(examples) for _, examples in encoded] == [1, 1]
    assert report.refused() == {"example_longer_than_row": 1}
    assert report.edits == {"examples_longer_than_row": 1}


def conversation(number: int, turns: int = 3):
    messages = []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": f"question {number} {turn}"},
            {"role": "assistant", "content": f"answer {number} {turn}"},
        ]
    return dialogue(messages)


def test_one_turn_of_a_dialogue_is_drawn(tokenizer):
    """Each as often as the others, whatever stands around the dialogue, and the example is the one of all turns."""
    dialogues = [conversation(number) for number in range(200)]
    everything = Encoder(tokenizer, "sft", 512, "drop").encode(dialogues)
    drawn = Encoder(tokenizer, "sft", 512, "drop", "random").encode(dialogues)
    turns = [examples.index(example) for examples, (example,) in zip(everything, drawn, strict=True)]
    assert min(turns.count(turn) for turn in range(3)) > 67 - 4 * 6.7
    assert drawn[150:] == Encoder(tokenizer, "sft", 512, "drop", "random").encode(dialogues[150:])
    assert drawn != Encoder(tokenizer, "sft", 512, "drop", "random", seed=1).encode(dialogues)


def test_a_dialogue_as_a_whole_ends_with_its_last_learned_answer(tokenizer):
    whole = conversation(0)
    untold = dialogue([*whole.messages, {"role": "assistant", "content": "no", "trained": False}])
    last = Encoder(tokenizer, "sft", 512, "drop").encode([whole])[0][-1]
    report = Report()
    # However short a row is: nothing is dropped, rows cut it.
    encoded = list(encode([whole, untold], Encoder(tokenizer, "unified", 16, "drop"), report))
    assert [tokens.tolist() for _, (tokens,) in encoded] == [last.tokens, last.tokens]
    assert len(last.tokens) > 16
    assert sum(report.histograms["tokens"].values()) == 2


@pytest.fixture(params=["left out", "unknown"])
def english(request):
    """A tokenizer that knows a few English words; what it does not know it leaves out, or marks."""
    names = ["hello", "world", "user", "assistant", "<unk>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    model = models.BPE({letter: number for number, letter in enumerate("helowrdusatin")}, [])
    if request.param == "unknown":
        model = models.WordLevel(vocabulary, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return ensure_special_tokens(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_a_document_of_which_nothing_is_left_is_not_kept(english):
    report = Report()
    documents = [Document("hello world"), Document("床前明月光"), Document("疑是 地上霜")]
    encoded = list(encode(documents, Encoder(english, "pretrain", 32, "drop"), report))
    assert [document.text for document, _ in encoded] == ["hello world"]
    assert report.refused() == {"not_in_vocabulary": 2}
    assert report.tokenizer["documents"] == 3
    assert report.tokenizer["empty_documents"] == report.tokenizer["lossy_documents"] == 2


def test_an_answer_of_which_nothing_is_left_is_not_kept(english):
    report = Report()
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    empty = [turns[0], {"role": "assistant", "content": "床前"}]
    dialogues = [dialogue(empty), dialogue([*turns, *empty])]
    encoded = list(encode(dialogues, Encoder(english, "sft", 200, "drop"), report))
    assert [len(examples) for _, examples in encoded] == [1]
    assert report.refused() == {"not_in_vocabulary": 1}
    assert report.edits == {"examples_not_in_vocabulary": 1}


def test_a_dialogue_that_the_template_refuses_is_refused_with_its_reason(tokenizer):
    strict = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    strict.chat_template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    strict = ensure_special_tokens(strict)
    ask, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    report = Report()
    dialogues = [
        dialogue([ask, ask, answer]),
        dialogue([ask, answer]),
        dialogue([ask, answer, ask, ask, answer]),
    ]
    encoded = list(encode(dialogues, Encoder(strict, "sft", 64, "drop"), report))
    assert [len(examples) for _, examples in encoded] == [1, 1]
    assert report.refused() == {"refused_by_template: roles must alternate": 1}
    assert report.edits == {"examples_refused_by_template: roles must alternate": 1}
