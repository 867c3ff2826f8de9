"""The tokenizer as an input of the stage (trained and used: tests/pipelines/test_prepare.py)."""

import pytest

from llada.data.work.config import PrepareConfig
from llada.errors import UserError
from pipelines.corpus.tokenizer import given_tokenizer


def test_a_given_tokenizer_is_an_input_by_its_content(tmp_path):
    for name, content in (("a", "{}"), ("b", "{}"), ("c", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(content)
    # A given one is used, whatever would be trained without it.
    given = [
        given_tokenizer(PrepareConfig(tokenizer=str(tmp_path / name), train_tokenizer_vocab=9))
        for name in "abc"
    ]
    (a,), (b,), (c,) = given
    assert a["id"] == b["id"] == "tokenizer 44136fa355b3678a"
    assert c["id"] != a["id"]
    assert given_tokenizer(PrepareConfig(train_tokenizer_vocab=9)) == []


def test_there_must_be_one_or_a_size_to_train(tmp_path):
    with pytest.raises(UserError, match=r"give a tokenizer's folder \(tokenizer\), or train one"):
        given_tokenizer(PrepareConfig())
    with pytest.raises(UserError, match=r"no tokenizer\.json in"):
        given_tokenizer(PrepareConfig(tokenizer=str(tmp_path)))
