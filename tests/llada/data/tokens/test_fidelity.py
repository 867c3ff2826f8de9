"""What a tokenizer may change, what counts as lost, and which documents are looked at."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llada.data.tokens.fidelity import compare, is_sampled
from llada.tokenizer import train_tokenizer

TEXT = "The Café is ﬁne.  Isn't it?\n\tYes"


def lower_casing() -> PreTrainedTokenizerFast:
    """As BERT: lower case, no accents, spaces where it likes; it knows the letters of the text."""
    letters = sorted(set("the cafe is fine. isn't it? yes") - {" "})
    words = [*letters, *(f"##{letter}" for letter in letters), "[UNK]"]
    backend = Tokenizer(
        models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.BertNormalizer()])
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def test_every_text_survives_a_byte_level_tokenizer():
    found = compare(train_tokenizer(["a text"], 270), TEXT + "床前 🙂\u200b")
    tokens = found.pop("tokens")
    assert tokens > 30
    assert found.pop("characters") > 25
    assert found.pop("documents") == 1
    assert set(found.values()) == {0}


def test_case_accents_and_spaces_are_changed_but_not_lost():
    found = compare(lower_casing(), TEXT)
    assert (found["altered_documents"], found["lossy_documents"], found["lost_characters"]) == (1, 0, 0)


@pytest.mark.parametrize(("text", "lost", "empty"), [("The 床 fine", 1, 0), ("床前明月光", 5, 1), ("", 0, 1)])
def test_what_is_not_known_is_lost(text, lost, empty):
    found = compare(lower_casing(), text)
    assert (found["lost_characters"], found["empty_documents"]) == (lost, empty)
    assert found["unknown_tokens"] == (lost > 0) or lost > 1


def test_the_sample_is_the_first_documents_and_some_of_the_others():
    assert all(is_sampled(number, "x") for number in range(32))
    chosen = [number for number in range(32, 10_000) if is_sampled(number, f"text {number}")]
    assert 80 < len(chosen) < 300
    assert is_sampled(chosen[0], f"text {chosen[0]}")
