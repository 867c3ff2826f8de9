"""Every preset is built, on the meta device, and is one coherent recipe; configs survive JSON and refuse typos."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llada.config import Recipe
from llada.diffusion.embedding_noise import EmbeddingNoiseConfig
from llada.diffusion.schedule import get_schedule
from llada.diffusion.time import time_and_weight
from llada.errors import UserError
from llada.model.transformer import Transformer
from llada.presets import PRESETS, get_preset, twin
from llada.settings import from_json, to_json
from llada.tokenizer import ensure_special_tokens, vocab_size

PARAMETERS = {
    "llada_1b": 1_487_243_264,
    "llada_8b": 8_015_581_184,
    "illada_8b": 7_615_025_152,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_fit_together(name):
    recipe = get_preset(name)
    with torch.device("meta"):
        model = Transformer(recipe.model)
    count = sum(p.numel() for p in model.parameters())
    assert count == recipe.model.num_parameters == PARAMETERS.get(name, count)
    assert recipe.prepare.tokenizer or recipe.prepare.train_tokenizer_vocab
    for config, run in ((recipe.prepare, recipe.pretrain), (recipe.sft_prepare, recipe.sft)):
        assert config.row_length <= recipe.model.max_length
        assert run.train.global_batch_tokens % config.row_length == 0
    assert recipe.sft_prepare.kind == ("unified" if name == "illada_8b" else "sft")
    assert recipe.sampling.gen_length <= recipe.model.max_length


def test_published_schedules():
    """LLaDA 8B, §2.2: 2.3 T tokens; 4e-4, 1e-4 from 1.2 T on, then linear to 1e-5 over the last 0.3 T."""
    from llada.training.optim import lr_factor

    run = get_preset("llada_8b").pretrain
    steps = run.train.num_steps
    assert steps is not None
    assert steps * run.train.global_batch_tokens == pytest.approx(2.3e12, rel=1e-5)

    def lr(tokens: float) -> float:
        return run.optim.lr * lr_factor(int(tokens / run.train.global_batch_tokens), steps, run.optim)

    assert lr(1e12) == pytest.approx(4e-4)
    assert lr(1.21e12) == pytest.approx(1e-4)
    assert lr(1.99e12) == pytest.approx(1e-4)
    assert lr(2.15e12) == pytest.approx(5.5e-5, rel=1e-3)
    assert lr(2.3e12 - run.train.global_batch_tokens) == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "rows", "length", "tokens"),
    [
        ("mdlm_small", 512, 1024, 524e9),
        ("mdlm_lm1b", 512, 128, 65.5e9),
        ("llada_1b", 1280, 4096, 400e9),
        ("llada_8b", 1280, 4096, 2.3e12),
        ("illada_8b", 640, 8192, 12e12),
    ],
)
def test_published_batches_and_tokens(name, rows, length, tokens):
    recipe = get_preset(name)
    train = recipe.pretrain.train
    assert recipe.prepare.row_length == length == recipe.model.max_length
    assert train.global_batch_tokens == rows * length
    assert train.num_steps * train.global_batch_tokens == pytest.approx(tokens, rel=2e-3)
    assert train.ema_decay == (0.9999 if name.startswith("mdlm") else None)


def test_the_fine_tuning_of_illada():
    """12 epochs at 5e-6, the last tenth linear to 5e-7; prompts are learned too."""
    run = get_preset("illada_8b").sft
    assert (run.train.num_epochs, run.train.num_steps) == (12, None)
    assert run.optim.lr == 5e-6
    assert run.optim.lr * run.optim.final_lr_ratio == pytest.approx(5e-7)
    assert (run.optim.decay, run.optim.decay_fraction) == ("linear", 0.1)
    assert (run.objective.document_mask, run.objective.random_split) == (True, 0)


@pytest.mark.parametrize("kind", ["ar", "bert"])
@pytest.mark.parametrize("name", PRESETS)
def test_twins_differ_in_the_objective_alone(name, kind):
    recipe, other = get_preset(name), twin(get_preset(name), kind)
    model = dataclasses.replace(recipe.model, causal=kind == "ar")
    assert other.model == model
    for run, changed in ((recipe.pretrain, other.pretrain), (recipe.sft, other.sft)):
        samples = run.train.samples if kind == "bert" else 0
        assert (changed.optim, changed.train) == (run.optim, dataclasses.replace(run.train, samples=samples))
        assert changed.objective.document_mask == run.objective.document_mask
        if kind == "ar":
            assert changed.objective.kind == "autoregressive"
        else:
            assert changed.objective.kind == "masked_diffusion"
            t = torch.rand(9, dtype=torch.float64)
            t, weight = time_and_weight(t, get_schedule(changed.objective.schedule), changed.objective.time)
            assert weight.tolist() == pytest.approx([1 / 0.15] * 9)
    assert (other.prepare, other.sft_prepare) == (recipe.prepare, recipe.sft_prepare)


@pytest.mark.parametrize("kind", ["ar", "bert"])
def test_the_twin_of_what_began_autoregressive_is_one_that_can_be_trained(kind):
    recipe = get_preset("tiny")
    recipe = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, shift=True),
        pretrain=dataclasses.replace(
            recipe.pretrain,
            objective=dataclasses.replace(
                recipe.pretrain.objective,
                attention_annealing_steps=10,
                embedding_noise=EmbeddingNoiseConfig(0.02, 10),
            ),
        ),
    )
    other = twin(recipe, kind)
    assert other.model.shift == (kind == "bert")
    assert other.pretrain.objective.attention_annealing_steps == (10 if kind == "bert" else 0)
    assert other.pretrain.objective.embedding_noise.steps == (10 if kind == "bert" else 0)


@pytest.mark.parametrize(
    ("preset", "vocabulary", "special"),
    [
        ("mdlm_small", 50_257, {"eos_token": (50_256, "<|endoftext|>")}),
        (
            "mdlm_lm1b",
            30_522,
            {
                "pad_token": (0, "[PAD]"),
                "unk_token": (100, "[UNK]"),
                "cls_token": (101, "[CLS]"),
                "sep_token": (102, "[SEP]"),
                "mask_token": (103, "[MASK]"),
            },
        ),
    ],
)
def test_the_ids_of_a_preset_are_those_of_its_tokenizer(preset, vocabulary, special):
    """Of GPT-2's and BERT's special tokens, at their places, with what `prepare` adds to them."""
    words = {f"w{number}": number for number in range(vocabulary)}
    for number, token in special.values():
        words = {word: place for word, place in words.items() if place != number} | {token: number}
    backend = Tokenizer(models.WordLevel(words, unk_token=None))
    roles = {role: token for role, (_, token) in special.items()}
    tokenizer = ensure_special_tokens(PreTrainedTokenizerFast(tokenizer_object=backend, **roles))
    model = get_preset(preset).model
    assert model.mask_token_id == tokenizer.mask_token_id
    assert model.eos_token_id == tokenizer.eos_token_id
    assert model.pad_token_id == tokenizer.pad_token_id
    assert vocabulary < vocab_size(tokenizer) <= model.vocab_size


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    recipe = get_preset(name)
    assert from_json(Recipe, to_json(recipe)) == recipe


def test_json_is_strict():
    values = json.loads(to_json(get_preset("tiny")))
    values["pretrain"]["optim"]["warm_up_steps"] = 3
    with pytest.raises(ValueError, match=r"pretrain\.optim\.warm_up_steps; did you mean 'warmup_steps'"):
        from_json(Recipe, json.dumps(values))
    del values["pretrain"]["optim"]["warm_up_steps"]
    values["pretrain"]["optim"]["lr"] = "fast"
    with pytest.raises(ValueError, match=r"pretrain\.optim\.lr must be float, not 'fast'"):
        from_json(Recipe, json.dumps(values))
    values["pretrain"]["optim"]["lr"] = 1  # an integer is a fine float
    assert from_json(Recipe, json.dumps(values)).pretrain.optim.lr == 1.0
    values["model"]["num_heads"] = 7
    with pytest.raises(ValueError, match="d_model"):
        from_json(Recipe, json.dumps(values))
    with pytest.raises(ValueError, match="not valid JSON"):
        from_json(Recipe, "{")


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'llada_8b'"):
        get_preset("llada8b")


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_preset("tiny").model = None
