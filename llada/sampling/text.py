"""From text to text: prompts in, completions out, around the sampler that works on ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerFast

from llada.model.transformer import Transformer
from llada.sampling.sampler import SamplingConfig, generate
from llada.tokenizer import END_OF_TURN, encode_texts, render_chat

Prompt = str | Sequence[dict[str, str]]  # plain text, or chat messages


def end_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The ids that end a text: EOS, and the end of a chat turn where there is one."""
    ids = {tokenizer.eos_token_id, tokenizer.get_vocab().get(END_OF_TURN)}
    return {i for i in ids if i is not None}


def cut_at_end(ids: Sequence[int], ends: set[int]) -> list[int]:
    """The ids before the first that ends the text."""
    for position, token in enumerate(ids):
        if token in ends:
            return list(ids[:position])
    return list(ids)


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> list[int]:
    """A plain prompt's ids, or a conversation's ids up to the open assistant turn."""
    if isinstance(prompt, str):
        return list(encode_texts(tokenizer, [prompt])[0]) if prompt else []
    return render_chat(tokenizer, list(prompt))


def complete_texts(
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    *,
    seed: int | Sequence[int] = 0,
) -> list[dict[str, Any]]:
    """Complete prompts in one batch. Each result: prompt, text, finish_reason ("stop" | "length"), tokens, nfe.

    Raises:
        ValueError: a prompt that leaves no room for `config.gen_length` tokens in the model's context.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    longest = max((len(row) for row in ids), default=0)
    if longest + config.gen_length > model.config.max_length:
        raise ValueError(
            f"a prompt of {longest} tokens and gen_length {config.gen_length} exceed the model's context of "
            f"{model.config.max_length}"
        )
    out = generate(
        model,
        ids,
        mask_id=tokenizer.mask_token_id,
        eos_id=tokenizer.eos_token_id,
        seed=seed,
        **asdict(config),
    )
    ends = end_ids(tokenizer)
    results = []
    for prompt, row in zip(prompts, out.sequences[:, longest:].tolist(), strict=True):
        answer = cut_at_end(row, ends)
        results.append(
            {
                "prompt": prompt,
                "text": tokenizer.decode(answer, skip_special_tokens=True),
                "finish_reason": "stop" if len(answer) < len(row) else "length",
                "tokens": len(answer),
                "nfe": out.nfe,
            }
        )
    return results
