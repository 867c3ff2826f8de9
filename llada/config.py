"""One recipe, complete: what to prepare, learn, fine-tune and how to sample. Where it runs is not in it.

The settings stand beside their consumers (llada/settings.py reads and writes them); here they are composed.
"""

from __future__ import annotations

from dataclasses import dataclass

from llada.data.work.config import PrepareConfig
from llada.model.transformer import ModelConfig
from llada.sampling.config import SamplingConfig
from llada.training.run import RunConfig


@dataclass(frozen=True)
class Recipe:
    """A preset: every stage's settings, made to go together."""

    model: ModelConfig
    prepare: PrepareConfig
    pretrain: RunConfig
    sft_prepare: PrepareConfig
    sft: RunConfig
    sampling: SamplingConfig
