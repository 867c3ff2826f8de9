import json
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from llada.errors import UserError
from llada.tokenizer import (
    SPECIAL_TOKENS,
    encode_texts,
    ensure_special_tokens,
    has_tokenizer,
    load_tokenizer,
    render_chat,
    save_tokenizer,
    train_tokenizer,
)

TEXTS = ["the cat sat on the mat\n", "das Wetter ist schön, 天气很好 🙂\n", "def f(x):\n    return x\n"] * 20
# As LLaDA's folder has it: the open assistant header always follows, and the flag is not looked at.
OFFICIAL_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def published(shared_dir: Path) -> dict:
    return json.loads(
        (shared_dir / "data/tokenizers/llada_8b_special_tokens/special_tokens.json").read_text()
    )


def test_special_tokens_have_the_first_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4, 5]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0)
    assert (tokenizer.mask_token_id, tokenizer.bos_token_id) == (1, 2)


def test_training_is_deterministic_and_stays_within_the_size(tokenizer):
    again = train_tokenizer(iter(TEXTS), 400)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(tokenizer) <= 400
    with pytest.raises(UserError, match="at least 262"):
        train_tokenizer(TEXTS, 100)


@pytest.mark.parametrize(
    "text", ["", " two  spaces ", "naïve 日本 🙂\x07", "<|mdm_mask|> and <|endoftext|>", "a\r\n\tb"]
)
def test_text_survives_and_never_becomes_a_special_token(tokenizer, text):
    ids = encode_texts(tokenizer, [text])[0]
    assert tokenizer.decode(ids) == text
    assert all(token >= len(SPECIAL_TOKENS) for token in ids)


def test_long_texts_are_encoded_in_pieces_without_a_difference(tokenizer, monkeypatch):
    text = "the cat  sat\n\non the mat\n" * 200
    whole = encode_texts(tokenizer, [text, "cat"])
    monkeypatch.setattr("llada.tokenizer._PIECE_CHARS", 50)
    assert encode_texts(tokenizer, [text, "cat"]) == whole


def test_save_and_load(tokenizer, tmp_path):
    assert not has_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version"')
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert has_tokenizer(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.mask_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 0, 0)
    assert encode_texts(loaded, TEXTS[:3]) == encode_texts(tokenizer, TEXTS[:3])
    assert load_tokenizer(tmp_path, mask_token_id=5).mask_token_id == 1  # what the folder declares wins


def test_a_folder_without_a_mask_token_takes_the_given_id(tokenizer, tmp_path):
    undeclared = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>"
    )
    save_tokenizer(undeclared, tmp_path)
    assert load_tokenizer(tmp_path).mask_token is None
    loaded = load_tokenizer(tmp_path, mask_token_id=1, pad_token_id=0)
    assert (loaded.mask_token, loaded.pad_token) == ("<|mdm_mask|>", "<|endoftext|>")
    with pytest.raises(UserError, match="no token with id 126336"):
        load_tokenizer(tmp_path, mask_token_id=126336)


def test_a_foreign_tokenizer_gains_what_it_lacks(shared_dir, tmp_path):
    folder = shared_dir / "data/tokenizers/gpt-neox-olmo-dolma-v1_5"
    plain = load_tokenizer(folder, eos_token_id=50279)
    before, size = encode_texts(plain, TEXTS[:3]), len(plain)
    ready = ensure_special_tokens(plain)
    assert encode_texts(ready, TEXTS[:3]) == before
    assert (ready.eos_token_id, ready.pad_token_id) == (50279, 50279)
    assert ready.mask_token_id >= size
    save_tokenizer(ready, tmp_path)
    messages = [{"role": "user", "content": "Hi"}]
    assert render_chat(load_tokenizer(tmp_path), messages) == render_chat(ready, messages)


@pytest.mark.parametrize("template", ["official", "ours"])
def test_chat_is_rendered_as_published(published, template):
    """With LLaDA's own strings: the ids of the rendered prompt spell the published example."""
    toy = train_tokenizer(TEXTS, 300)
    names = [entry["token"] for entry in published["named_tokens"]]
    toy.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    if template == "official":
        toy.chat_template = OFFICIAL_TEMPLATE
    example = published["chat_template"]["example"]
    ids = render_chat(toy, example["messages"])
    assert toy.decode(ids) == example["text"]
    assert ids == toy(example["text"], add_special_tokens=False)["input_ids"]


def test_a_message_cannot_smuggle_in_special_tokens(tokenizer):
    text = "a<|eot_id|><|mdm_mask|>\ue0000\ue001 <|start_header_id|>"
    ids = render_chat(tokenizer, [{"role": "user", "content": text}])
    assert 1 not in ids
    assert ids.count(5) == 1
    assert ids.count(3) == 2
    assert text in tokenizer.decode(ids)


def test_render_chat_refuses_what_it_cannot_render(tokenizer):
    with pytest.raises(UserError, match="at least one message"):
        render_chat(tokenizer, [])
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no chat template"):
        render_chat(bare, [{"role": "user", "content": "Hi"}])
