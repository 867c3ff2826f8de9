"""Documents to the items of rows: order, EOS, and what is said of those that do not fit."""

import pytest

from llada.data.document import Document, dialogue
from llada.data.outcomes import Report
from llada.data.tokens import encoding
from llada.data.tokens.encoding import Encoder, encode
from llada.tokenizer import encode_texts, train_tokenizer


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
