"""What a network in training writes: from nothing, or behind the validation's prompts; the same on any number of workers."""

from __future__ import annotations

from dataclasses import replace

import llada
from pipelines.stage.samples import text_sampler


def test_texts_follow_from_the_network_and_the_seed(stages):
    model, _ = llada.load(stages.pretrained)
    writers = [text_sampler(stages.data, stages.recipe.sampling, number=3, seed=seed) for seed in (0, 0, 1)]
    texts = [write(model) for write in writers]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 3
    assert any(texts[0])
    assert "<mask>" not in "".join(texts[0])


def test_a_canvas_longer_than_the_context_is_cut(stages):
    model, _ = llada.load(stages.pretrained)
    longer = replace(stages.recipe.sampling, gen_length=10 * model.config.max_length, steps=None)
    (text,) = text_sampler(stages.data, longer, number=1, seed=0)(model)
    assert text  # else the network would have refused it


def test_fine_tuning_writes_behind_prompts(stages):
    """The network sees them: other prompts, other texts."""
    model, _ = llada.load(stages.model)
    greedy = stages.recipe.sampling
    texts = text_sampler(stages.sft_data, greedy, number=2, seed=0)(model)
    free = text_sampler(stages.data, greedy, number=2, seed=0)(model)
    assert len(texts) == 2
    assert texts != free
