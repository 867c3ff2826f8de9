"""Texts that a network in training writes at its validations, for people to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields

import numpy as np
import torch.distributed as dist
from torch import Tensor

from llada.data.tokens.shards import TokenDataset
from llada.files import join
from llada.model.transformer import Transformer
from llada.sampling.cache import OF_SOME_CACHES
from llada.sampling.config import SamplingConfig
from llada.sampling.generate import generate
from llada.tokenizer import load_tokenizer
from llada.training.parallel import world
from pipelines.stage.artifact import fetch_folder


def text_sampler(
    data: str, config: SamplingConfig, *, number: int, seed: int
) -> Callable[[Transformer], list[str]]:
    """What writes `number` texts with a network: from nothing or, with fine-tuning data, behind the first prompts of the
    validation split. Always from the same noise, so that what changes is the network. A collective of all workers.

    Args:
        data: a prepared folder, with its tokenizer.
    """
    tokenizer = load_tokenizer(fetch_folder(join(data, "tokenizer")))
    held_out = TokenDataset(data, "validation")
    rows = held_out.rows(np.arange(min(number, len(held_out))))
    # What may be learned is the answer; of plain text, all.
    answers = rows.maskable.argmax(1).tolist()
    prompts = [tokens[:begin].tolist() for tokens, begin in zip(rows.tokens, answers, strict=True)]
    prompts += [[]] * (number - len(prompts))

    # A network whose weights FSDP gathers as a whole keeps no cache.
    whole = {
        field.name: field.default
        for field in fields(SamplingConfig)
        if field.name in ("cache", "suffix_window", "shared_depth", "shared_prefix", *OF_SOME_CACHES)
    }

    def write(model: Transformer) -> list[str]:
        length = min(config.gen_length, model.config.max_length - max(map(len, prompts)))
        steps = None if config.steps is None else max(1, config.steps * length // config.gen_length)
        knobs = asdict(config) | whole
        knobs |= {"gen_length": length, "block_length": min(config.block_length, length), "steps": steps}

        def logits(tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            device = model.embed.weight.device
            mask = None if attention_mask is None else attention_mask.to(device)
            values = model(tokens.to(device), mask).float()
            if world()[1] > 1:  # or rounding might let the workers part, and wait for each other
                dist.broadcast(values, 0)
            return values.cpu()

        output = generate(
            logits,
            prompts,
            mask_id=model.config.mask_token_id,
            eos_id=tokenizer.eos_token_id,
            seed=seed,
            **knobs,
        )
        begin = output.sequences.shape[1] - length
        answers = output.sequences[:, begin:].tolist()
        return [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]

    return write
