"""From text to text: a folder loaded with its tokenizer, prompts in, completions out, around the sampler of ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from llada.errors import UserError
from llada.model.hf import load_model
from llada.model.predict import Model, config_eos_id
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.config import SamplingConfig
from llada.sampling.inputs import as_ids
from llada.tokenizer import (
    END_OF_TURN,
    encode_texts,
    has_tokenizer,
    load_tokenizer,
    render_chat,
    vocab_size,
)


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
) -> tuple[Transformer, PreTrainedTokenizerFast | None]:
    """The network and tokenizer of a checkpoint folder: ours, an official GSAI-ML/LLaDA one, or iLLaDA's.

    Args:
        path: a local folder with config.json and one or several safetensors.
        device, dtype: where and as what the weights are held ("bf16", torch.float32, …); None means CPU and the file's
            dtype, the widest of several.

    Returns:
        The network in evaluation mode, and the tokenizer with its mask token set, which pads on the left (None if the
        folder has none).

    Raises:
        UserError: no checkpoint there, any missing, unused or mis-shaped tensor, a setting that the network cannot honour,
            or a tokenizer that does not fit it, each named.
    """
    model = load_model(path, device=device, dtype=dtype)
    tokenizer = checkpoint_tokenizer(path, model.config)
    if tokenizer is not None and model.config.mask_token_id is None and not model.config.causal:
        model.config = replace(model.config, mask_token_id=tokenizer.mask_token_id)
    return model, tokenizer


def checkpoint_tokenizer(path: str | Path, config: ModelConfig) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a checkpoint folder with this network, as `load` gives it, without the weights."""
    if not has_tokenizer(path):
        return None
    tokenizer = load_tokenizer(
        path,
        mask_token_id=config.mask_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    if vocab_size(tokenizer) > config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has ids up to {vocab_size(tokenizer) - 1}, the embedding {config.vocab_size} rows; give "
            "the checkpoint the tokenizer that it was trained with"
        )
    if config.mask_token_id not in (None, tokenizer.mask_token_id):
        raise UserError(
            f"{path}: the mask is id {config.mask_token_id} in config.json, but {tokenizer.mask_token!r} with id "
            f"{tokenizer.mask_token_id} in the tokenizer; correct the one that is wrong"
        )
    tokenizer.padding_side = "left"  # what is generated stands behind a prompt
    return tokenizer


Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
"""Plain text, chat messages, or token ids."""


def end_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The ids that end a text: EOS, and the end of a chat turn where there is one."""
    ids = {tokenizer.eos_token_id, turn_end(tokenizer)}
    return {i for i in ids if i is not None}


def turn_end(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id that ends a chat turn, <|eot_id|>."""
    return tokenizer.get_vocab().get(END_OF_TURN)


def text_ends(model: Model, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """All ids that end a text: the checkpoint's, its EOS first, and those of the tokenizer."""
    declared = [*as_ids(config_eos_id(model)), *getattr(model, "end_ids", ())]
    return list(dict.fromkeys([*declared, *sorted(end_ids(tokenizer))]))


def spell_fixed(tokenizer: PreTrainedTokenizerFast, config: SamplingConfig) -> SamplingConfig:
    """The settings with the texts of `fixed` as token ids, one a position, and those of `allowed` and `forbidden`.

    Raises UserError when two tokens would stand at one position, a text reaches behind the last one, or one that is to be
    allowed or forbidden is not one token.
    """
    if not (config.fixed or config.allowed or config.forbidden):
        return config
    spelled: dict[int, int | str] = {}
    for start, given in sorted((config.fixed or {}).items()):
        ids = encode_texts(tokenizer, [given])[0] if isinstance(given, str) else [given]
        for position, token in enumerate(ids, start=start):
            if position in spelled:
                raise UserError(f"sampling: fixed puts two tokens at position {position}")
            spelled[position] = token
    return replace(
        config,
        fixed=spelled or None,
        allowed=_spell_tokens(tokenizer, config, "allowed"),
        forbidden=_spell_tokens(tokenizer, config, "forbidden"),
    )


def _spell_tokens(
    tokenizer: PreTrainedTokenizerFast, config: SamplingConfig, name: str
) -> dict[Any, Any] | None:
    """`allowed` or `forbidden` with ids in the place of texts."""
    given = getattr(config, name)
    if not given:
        return None

    texts = list({token: None for tokens in given.values() for token in tokens if isinstance(token, str)})
    encoded = dict(zip(texts, encode_texts(tokenizer, texts), strict=True)) if texts else {}

    def spell(position: int | str, token: int | str) -> int:
        if not isinstance(token, str):
            return token
        ids = encoded[token]
        if len(ids) != 1:
            raise UserError(
                f"sampling: {name} holds {token!r} at position {position}, which is {len(ids)} tokens; name single tokens"
            )
        return int(ids[0])

    return {
        position: tuple(dict.fromkeys(spell(position, token) for token in tokens))
        for position, tokens in given.items()
    }


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: Prompt, tools: Sequence[Any] = ()) -> list[int]:
    """A plain prompt's ids, or a conversation's ids up to the open assistant turn, which may call `tools`; ids are kept."""
    if isinstance(prompt, str):
        return list(encode_texts(tokenizer, [prompt])[0]) if prompt else []
    ids = [part for part in prompt if isinstance(part, int)]
    return ids or render_chat(tokenizer, [part for part in prompt if not isinstance(part, int)], tools=tools)
