"""Masked-diffusion language models in plain PyTorch: load, generate, infill, noise, loss, likelihood.

Imports neither Ray nor MLflow; the stages around it live in `pipelines`. Names are imported at first use, so that a data
worker which needs `llada.data` alone does not wait for PyTorch.
"""

from __future__ import annotations

import importlib

# True to checkers. `typing` takes 10 ms, for which each Python of the environment would wait (llada/evals/plugin.py).
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from llada.diffusion.likelihood import PerplexityBound, log_likelihood, perplexity_bound
    from llada.diffusion.objective import NoisyBatch, forward_process, masked_diffusion_loss
    from llada.model.hf import load_model
    from llada.model.transformer import ModelConfig, Transformer
    from llada.sampling.generate import GenerateOutput, generate, infill
    from llada.sampling.rounds import generate_rounds
    from llada.sampling.text import load

__version__ = "0.1.0"

_HOME = {
    "GenerateOutput": "llada.sampling.generate",
    "ModelConfig": "llada.model.transformer",
    "NoisyBatch": "llada.diffusion.objective",
    "PerplexityBound": "llada.diffusion.likelihood",
    "Transformer": "llada.model.transformer",
    "forward_process": "llada.diffusion.objective",
    "generate": "llada.sampling.generate",
    "generate_rounds": "llada.sampling.rounds",
    "infill": "llada.sampling.generate",
    "load": "llada.sampling.text",
    "load_model": "llada.model.hf",
    "log_likelihood": "llada.diffusion.likelihood",
    "masked_diffusion_loss": "llada.diffusion.objective",
    "perplexity_bound": "llada.diffusion.likelihood",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llada' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


__all__ = [
    "GenerateOutput",
    "ModelConfig",
    "NoisyBatch",
    "PerplexityBound",
    "Transformer",
    "forward_process",
    "generate",
    "generate_rounds",
    "infill",
    "load",
    "load_model",
    "log_likelihood",
    "masked_diffusion_loss",
    "perplexity_bound",
]
