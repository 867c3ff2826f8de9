"""Every preset is built, on the meta device, and is one coherent recipe; configs survive JSON and refuse typos."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from llada.config import Recipe
from llada.errors import UserError
from llada.model.transformer import Transformer
from llada.presets import PRESETS, get_preset
from llada.settings import from_json, to_json

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
    assert recipe.sft_prepare.kind == "sft"
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
