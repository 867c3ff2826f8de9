"""Text in, text out: a folder with its tokenizer, prompts completed in a batch as alone, and where a text ends."""

from __future__ import annotations

from pathlib import Path

import pytest

import llada
from llada.errors import UserError
from llada.model.hf import save_model
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.config import SamplingConfig
from llada.sampling.text import complete_texts, cut_at_end, end_ids, prompt_ids
from llada.tokenizer import END_OF_TURN, encode_texts, render_chat, save_tokenizer, train_tokenizer

TOKENIZER = train_tokenizer(["The cat sat on the mat. The dog ran off."] * 5, 300)
EOS = TOKENIZER.eos_token_id
EOT = TOKENIZER.convert_tokens_to_ids(END_OF_TURN)
SAMPLING = SamplingConfig(gen_length=10, steps=10, block_length=5, temperature=1.0)


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


def test_a_text_ends_before_its_first_end_token() -> None:
    assert end_ids(TOKENIZER) == {EOS, EOT}
    assert cut_at_end([7, 8, EOT, 9, EOS], {EOS, EOT}) == [7, 8]
    assert cut_at_end([7, 8], {EOS, EOT}) == [7, 8]
    assert cut_at_end([EOS], {EOS, EOT}) == []


def test_a_batch_of_prompts_is_each_alone(folder: Path) -> None:
    model, _ = llada.load(folder)
    prompts = ["The cat", "The dog ran off. The cat sat", [{"role": "user", "content": "The mat?"}]]
    together = complete_texts(model, TOKENIZER, prompts, SAMPLING, seed=[4, 5, 6])
    for prompt, seed, completion in zip(prompts, (4, 5, 6), together, strict=True):
        (alone,) = complete_texts(model, TOKENIZER, [prompt], SAMPLING, seed=[seed])
        assert {**alone, "nfe": 0} == {**completion, "nfe": 0}
        assert list(completion) == ["prompt", "text", "finish_reason", "tokens", "nfe"]
        assert completion["prompt"] == prompt
        assert (completion["finish_reason"] == "length") == (completion["tokens"] == 10)


def test_a_prompt_that_leaves_no_room_is_refused(folder: Path) -> None:
    model, _ = llada.load(folder)
    with pytest.raises(UserError, match=r"gen_length 10 exceed the model's context of 48"):
        complete_texts(model, TOKENIZER, ["The cat sat on the mat. " * 9], SAMPLING)
