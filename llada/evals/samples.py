"""What a checkpoint writes: the prompts of the settings, completed in one batch, in samples.jsonl and in the results."""

from __future__ import annotations

import json

from llada.errors import UserError
from llada.evals.autoregressive.writing import check_writing, complete_left_to_right
from llada.evals.evaluation import Evaluation, Figures
from llada.files import join, write_bytes
from llada.sampling.completions import complete_texts

SAMPLES_FILE = "samples.jsonl"


def write_samples(evaluation: Evaluation) -> Figures:
    """{"samples": the completions}. Raises UserError when the checkpoint has no tokenizer."""
    network, tokenizer = evaluation.open_model(fast=False)
    if tokenizer is None:
        raise UserError(f"{evaluation.model} has no tokenizer, which the task samples needs")
    config = evaluation.config
    prompts = list(config.prompts)
    if network.config.causal:
        check_writing(config.sampling, evaluation.model)
        samples = complete_left_to_right(network, tokenizer, prompts, config.sampling, seed=config.seed)
    else:
        samples = complete_texts(network, tokenizer, prompts, config.sampling, seed=config.seed)
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_bytes(join(evaluation.output, SAMPLES_FILE), lines.encode())
    return {"samples": samples}
