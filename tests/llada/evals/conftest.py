"""Small checkpoints, and a task run on one in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llada.evals.evaluation import EvaluateConfig, Evaluation
from llada.evals.harness import open_folder
from llada.model.hf import save_model
from llada.model.transformer import ModelConfig, Transformer
from llada.tokenizer import save_tokenizer, train_tokenizer

WORDS = "The cat sat on the mat. 床前明月光，疑是地上霜。 What is it? It is what it is; nothing else."


def _save(folder: Path, *, context: int = 64, seed: int = 0, **changes: Any) -> str:
    tokenizer = train_tokenizer([WORDS] * 5, 300)
    ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    network = Transformer(ModelConfig(300, 16, 1, 2, 32, max_length=context, **ids, **changes))
    network.init_weights(seed)
    save_model(network, folder)
    save_tokenizer(tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="session")
def save_checkpoint() -> Callable[..., str]:
    """(folder, context=64, seed=0, settings of ModelConfig) -> the folder, with a random network of 16 dimensions and a tokenizer
    of bytes and a few words."""
    return _save


@pytest.fixture(scope="session")
def diffusion_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A masked-diffusion checkpoint."""
    return _save(tmp_path_factory.mktemp("diffusion"))


@pytest.fixture(scope="session")
def causal_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its autoregressive twin."""
    return _save(tmp_path_factory.mktemp("causal"), causal=True)


@pytest.fixture
def evaluation_of(tmp_path: Path) -> Callable[[str, EvaluateConfig], Evaluation]:
    """(checkpoint folder, settings) -> an evaluation whose blocks are run here, through JSON as between processes."""

    def map_blocks(
        build: Callable[[], Callable[[Any], Any]], blocks: Sequence[Any], *, folder: str
    ) -> Iterator[Any]:
        assert len({block["name"] for block in blocks}) == len(blocks)
        function = build()
        return (json.loads(json.dumps(function(json.loads(json.dumps(block))))) for block in blocks)

    def make(model: str, config: EvaluateConfig) -> Evaluation:
        open_model = partial(open_folder, model, None, None)
        return Evaluation(config, model, open_model, None, str(tmp_path / "out"), map_blocks, lambda: model)

    return make
