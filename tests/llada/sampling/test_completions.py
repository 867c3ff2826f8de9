"""Many prompts, completed: each as alone, whatever joins and leaves beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from llada.errors import UserError
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.completions import complete_texts
from llada.sampling.config import SamplingConfig
from llada.sampling.generate import generate, infill
from llada.sampling.text import text_ends
from llada.tokenizer import END_OF_TURN, encode_texts, train_tokenizer

TOKENIZER = train_tokenizer(["The cat sat on the mat. The dog ran off."] * 5, 300)
EOS = TOKENIZER.eos_token_id
EOT = TOKENIZER.convert_tokens_to_ids(END_OF_TURN)
SAMPLING = SamplingConfig(gen_length=10, steps=10, block_length=5, temperature=1.0)
CHOICES = (" cat", " mat")
PROMPTS: list = [
    "The cat",
    "The dog ran off. The cat sat",
    [{"role": "user", "content": "The mat?"}],
    "",
    "The",
]


def build_model(max_length: int = 48) -> Transformer:
    ids = {"mask_token_id": TOKENIZER.mask_token_id, "eos_token_id": EOS}
    model = Transformer(ModelConfig(300, 32, 2, 2, 64, max_length=max_length, **ids))
    model.init_weights(0)
    return model.eval()


@pytest.mark.parametrize("room", [{}, {"max_rows": 2}, {"max_tokens": 30}, {"max_rows": 3, "max_tokens": 1}])
def test_each_is_completed_as_alone(room: dict[str, int]) -> None:
    model = build_model()
    together = complete_texts(model, TOKENIZER, PROMPTS, SAMPLING, seed=[4, 5, 6, 7, 8], **room)
    for prompt, seed, completion in zip(PROMPTS, range(4, 9), together, strict=True):
        (alone,) = complete_texts(model, TOKENIZER, [prompt], SAMPLING, seed=[seed])
        assert alone == completion
        assert list(completion) == ["prompt", "text", "finish_reason", "tokens", "nfe", "reveal_step"]
        assert len(completion["reveal_step"]) == completion["tokens"]
        assert completion["prompt"] == prompt
        assert (completion["finish_reason"] == "length") == (completion["tokens"] == 10)


def test_is_what_generate_gives() -> None:
    model, ends = build_model(), text_ends(build_model(), TOKENIZER)
    for seed in range(4):
        (completion,) = complete_texts(model, TOKENIZER, ["The cat"], SAMPLING, seed=[seed])
        prompt = encode_texts(TOKENIZER, ["The cat"])
        out = generate(model, prompt, **dataclasses.asdict(SAMPLING), eos_id=ends, seed=seed)
        tokens = out.sequences[0, len(prompt[0]) :].tolist()
        length = next((i for i, token in enumerate(tokens) if token in ends), 10)
        assert completion["tokens"] == length
        assert completion["reveal_step"] == out.reveal_step[0, :length].tolist()
        assert completion["text"] == TOKENIZER.decode(tokens[:length], skip_special_tokens=True)


def test_a_gap_is_filled_as_infill_does_it() -> None:
    model, ends = build_model(), text_ends(build_model(), TOKENIZER)
    before, behind = encode_texts(TOKENIZER, ["The cat", "the mat."])
    config = dataclasses.replace(SAMPLING, gen_length=6, block_length=6, steps=6, temperature=0.0)
    forbidden = {"*": tuple(ends)}  # an end would end the gap, and infill knows none
    config = dataclasses.replace(config, forbidden=forbidden)
    gap, open_end = complete_texts(
        model, TOKENIZER, [before, before], config, suffixes=[behind, []], seed=0, max_tokens=20
    )
    row = torch.tensor([[*before, *[TOKENIZER.mask_token_id] * 6, *behind]])
    knobs = {"steps": 6, "forbidden": {"*": tuple(ends)}}
    filled = infill(model, row, **knobs).sequences[0, len(before) : len(before) + 6].tolist()
    assert gap["text"] == TOKENIZER.decode(filled, skip_special_tokens=True)
    assert gap["tokens"] == open_end["tokens"] == 6
    assert gap["text"] != open_end["text"]
    with pytest.raises(UserError, match="a canvas of 50 tokens exceeds the context length of 48"):
        complete_texts(model, TOKENIZER, [[5] * 20], config, suffixes=[[6] * 24])
    with pytest.raises(UserError, match="suffix_window=4 would hide what is given behind"):
        complete_texts(model, TOKENIZER, [[5]], dataclasses.replace(config, suffix_window=4), suffixes=[[6]])


def test_no_prompts_are_no_completions() -> None:
    assert complete_texts(build_model(), TOKENIZER, [], SAMPLING) == []


def test_a_reply_that_is_given_whole_needs_no_forward() -> None:
    config = SamplingConfig(gen_length=2, fixed={0: 40, 1: 41})
    both = complete_texts(build_model(), TOKENIZER, ["The", "The cat"], config)
    assert [(c["nfe"], c["tokens"], c["reveal_step"]) for c in both] == [(0, 2, [-1, -1])] * 2


def test_what_cannot_be_completed_is_refused() -> None:
    with pytest.raises(UserError, match=r"gen_length=10 .* exceeds the context length of 48: shorten"):
        complete_texts(build_model(), TOKENIZER, ["The cat sat on the mat. " * 9], SAMPLING)
    with pytest.raises(UserError, match="1 seeds for 2 prompts"):
        complete_texts(build_model(), TOKENIZER, ["The", "The"], SAMPLING, seed=[1])


def test_weights_that_are_no_numbers_end_the_run() -> None:
    model = build_model()
    model.layers[0].q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"layers\.0\.q_proj\.weight holds NaN"):
        complete_texts(model, TOKENIZER, ["The", "The cat"], SAMPLING)


def test_fixed_words_are_in_the_text() -> None:
    word = encode_texts(TOKENIZER, [" mat"])[0]
    config = dataclasses.replace(SAMPLING, steps=None, fixed={1: " mat", 1 + len(word): EOT + 20})
    (completion,) = complete_texts(build_model(), TOKENIZER, ["The cat"], config)
    assert " mat" in completion["text"]
    assert completion["nfe"] <= 10 - len(word) - 1


def test_allowed_words_are_in_the_text() -> None:
    config = dataclasses.replace(SAMPLING, steps=None, allowed={2: CHOICES}, forbidden={"*": (CHOICES[0],)})
    (completion,) = complete_texts(build_model(), TOKENIZER, ["The cat"], config)
    assert CHOICES[1] in completion["text"]


def test_every_end_that_the_checkpoint_declares_ends_a_text() -> None:
    model = build_model()
    model.end_ids = (EOS, 40)
    model.lm_head.weight.data[40] = 0
    model.lm_head.weight.data[41:] *= 0.01
    for seed in range(20):
        (completion,) = complete_texts(model, TOKENIZER, ["The"], SAMPLING, seed=seed)
        if completion["finish_reason"] == "stop":
            break
    assert completion["finish_reason"] == "stop"


def test_batch_invariant_reaches_every_product(watch_products: Callable[[Transformer], set[int]]) -> None:
    model = build_model()
    rows = watch_products(model)
    complete_texts(model, TOKENIZER, PROMPTS, SAMPLING, batch_invariant=True)
    assert rows == {64}
