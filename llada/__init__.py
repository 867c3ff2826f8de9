"""Masked-diffusion language models in plain PyTorch: load, generate, infill, noise, loss, likelihood.

Imports neither Ray nor MLflow; the stages around it live in `pipelines`.
"""

from llada.diffusion.likelihood import PerplexityBound, log_likelihood, perplexity_bound
from llada.diffusion.objective import NoisyBatch, forward_process, masked_diffusion_loss
from llada.model.hf import load_model
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.rounds import generate_rounds
from llada.sampling.sampler import GenerateOutput, generate, infill

__version__ = "0.1.0"

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


def load(path, *, device=None, dtype=None):
    """The network and tokenizer of a checkpoint folder: ours, an official GSAI-ML/LLaDA one, or iLLaDA's.

    Args:
        path: a local folder with config.json and one or several safetensors.
        device, dtype: where and as what the weights are held; None means CPU and the file's dtype.

    Returns:
        (Transformer in evaluation mode, transformers tokenizer with its mask token set | None if the folder has none)

    Raises:
        FileNotFoundError, ValueError: no checkpoint there, or any missing, unused or mis-shaped tensor, named.
    """
    from llada.tokenizer import has_tokenizer, load_tokenizer

    model = load_model(path, device=device, dtype=dtype)
    if not has_tokenizer(path):
        return model, None
    config = model.config
    return model, load_tokenizer(
        path,
        mask_token_id=config.mask_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
