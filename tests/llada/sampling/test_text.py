"""Text in, text out: a folder with its tokenizer, prompts as ids, and where a text ends."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import llada
from llada.errors import UserError
from llada.model.hf import save_model, save_state
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.config import SamplingConfig
from llada.sampling.text import end_ids, prompt_ids, spell_fixed, text_ends
from llada.tokenizer import END_OF_TURN, encode_texts, render_chat, save_tokenizer, train_tokenizer

TOKENIZER = train_tokenizer(["The cat sat on the mat. The dog ran off."] * 5, 300)
EOS = TOKENIZER.eos_token_id
EOT = TOKENIZER.convert_tokens_to_ids(END_OF_TURN)
SAMPLING = SamplingConfig(gen_length=10, steps=10, block_length=5, temperature=1.0)
CHOICES = (" cat", " mat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    ids = {"mask_token_id": TOKENIZER.mask_token_id, "eos_token_id": EOS}
    model = Transformer(ModelConfig(300, 32, 2, 2, 64, max_length=48, **ids))
    model.init_weights(0)
    save_model(model, path)
    return path


def test_a_folder_comes_with_its_tokenizer_if_it_has_one(folder: Path) -> None:
    assert llada.load(folder)[1] is None
    save_tokenizer(TOKENIZER, folder)
    model, tokenizer = llada.load(folder)
    assert tokenizer is not None
    assert tokenizer.mask_token_id == model.config.mask_token_id == TOKENIZER.mask_token_id
    assert not model.training


def test_prompts_are_text_or_conversations() -> None:
    turns = [{"role": "user", "content": "The cat"}]
    assert prompt_ids(TOKENIZER, "The cat") == encode_texts(TOKENIZER, ["The cat"])[0]
    assert prompt_ids(TOKENIZER, "") == []
    assert prompt_ids(TOKENIZER, turns) == render_chat(TOKENIZER, turns)


def test_a_text_ends_with_eos_or_a_turns_end() -> None:
    assert end_ids(TOKENIZER) == {EOS, EOT}


def test_two_sources_of_the_mask_must_agree(folder: Path, tmp_path: Path) -> None:
    model, _ = llada.load(folder)
    config = dataclasses.replace(model.config, mask_token_id=7)
    save_state(tmp_path, dict(model.state_dict()), config)
    save_tokenizer(TOKENIZER, tmp_path)
    with pytest.raises(UserError, match=r"the mask is id 7 in config\.json, but '<\|mdm_mask\|>' with id 1"):
        llada.load(tmp_path)
    # One that only the tokenizer names is taken.
    save_state(tmp_path, dict(model.state_dict()), dataclasses.replace(config, mask_token_id=None))
    assert llada.load(tmp_path)[0].config.mask_token_id == TOKENIZER.mask_token_id


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path: Path) -> None:
    rows = max(TOKENIZER.get_vocab().values())
    model = Transformer(ModelConfig(rows, 32, 2, 2, 64, max_length=48, mask_token_id=1, eos_token_id=0))
    save_model(model, tmp_path)
    save_tokenizer(TOKENIZER, tmp_path)
    with pytest.raises(UserError, match=rf"ids up to {rows}, the embedding {rows} rows"):
        llada.load(tmp_path)


def test_the_tokenizers_own_batches_can_be_continued(folder: Path) -> None:
    """Padded on either side by the tokenizer, each prompt gets what it gets alone."""
    save_tokenizer(TOKENIZER, folder)
    model, tokenizer = llada.load(folder)
    assert tokenizer is not None
    assert tokenizer.padding_side == "left"
    knobs: dict = {"gen_length": 8, "steps": 8, "block_length": 4, "seed": [3, 4]}
    texts = ["The cat sat on the mat.", "The"]
    for side in ("left", "right"):
        batch = tokenizer(texts, padding=True, return_tensors="pt", padding_side=side)
        out = llada.generate(model, batch["input_ids"], attention_mask=batch["attention_mask"], **knobs)
        for row, text in enumerate(texts):
            alone = llada.generate(
                model, [encode_texts(tokenizer, [text])[0]], **{**knobs, "seed": [3 + row]}
            )
            assert out.sequences[row, -8:].tolist() == alone.sequences[0, -8:].tolist()


def test_fixed_words_are_spelled_one_token_a_position() -> None:
    spelled = spell_fixed(TOKENIZER, dataclasses.replace(SAMPLING, fixed={1: " mat", 7: 5}))
    word = encode_texts(TOKENIZER, [" mat"])[0]
    assert spelled.fixed == {**dict(enumerate(word, start=1)), 7: 5}
    with pytest.raises(UserError, match="fixed puts two tokens at position 2"):
        spell_fixed(TOKENIZER, dataclasses.replace(SAMPLING, fixed={1: "The cat sat", 2: 5}))
    with pytest.raises(UserError, match=r"the position 10; those behind the prompt are 0 to 9"):
        spell_fixed(TOKENIZER, dataclasses.replace(SAMPLING, fixed={9: "The cat sat"}))


def test_allowed_words_are_single_tokens() -> None:
    (cat,), (mat,) = encode_texts(TOKENIZER, CHOICES)
    config = dataclasses.replace(
        SAMPLING,
        steps=None,
        fixed={0: "The"},
        allowed={2: CHOICES},
        forbidden={"*": (CHOICES[0], CHOICES[0], cat), 5: (mat,)},
    )
    spelled = spell_fixed(TOKENIZER, config)
    assert spelled.allowed == {2: (cat, mat)}
    assert spelled.forbidden == {"*": (cat,), 5: (mat,)}
    long = "The cat sat on the mat"
    with pytest.raises(UserError, match=f"allowed holds '{long}' at position 2, which is .* tokens"):
        spell_fixed(TOKENIZER, dataclasses.replace(SAMPLING, allowed={2: (long,)}))
    with pytest.raises(UserError, match=f"forbidden names {cat}, which fixed puts at position 1"):
        spell_fixed(TOKENIZER, dataclasses.replace(SAMPLING, fixed={1: CHOICES[0]}, forbidden={1: (cat,)}))
    assert spell_fixed(TOKENIZER, SAMPLING) is SAMPLING


def test_the_checkpoint_and_the_tokenizer_say_what_ends_a_text(folder: Path) -> None:
    model, _ = llada.load(folder)
    model.end_ids = (EOS, 40)
    assert text_ends(model, TOKENIZER) == [EOS, 40, EOT]
