"""What an autoregressive network writes: behind each text its next token, again and again.

Each token costs a forward over the text so far. What is kept of that is nothing: a twin is small, and a judge only reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from llada.diffusion.noise import row_keys
from llada.errors import UserError
from llada.model.predict import check_tokens, check_weights, device_of
from llada.model.transformer import Transformer
from llada.sampling.completions import TextCompletion
from llada.sampling.config import SamplingConfig, check_room
from llada.sampling.draw import Cut, draw_tokens
from llada.sampling.inputs import row_seeds, seed_keys
from llada.sampling.reply import Reply
from llada.sampling.rules import temperature_of
from llada.sampling.text import Prompt, end_ids, prompt_ids, text_ends, turn_end

HEEDED = ("gen_length", "temperature", "top_p", "top_k", "min_p", "logits_eos_inf")
"""The settings of SamplingConfig that say what is written. The others say in which order masks are unmasked, and at what cost."""
_REFUSED = ("fixed", "allowed", "forbidden", "cfg_scale", "initial_length")
# No id: what is still to come.
_UNWRITTEN = -1
IsOver = Callable[[int, list[int]], bool]
"""(number of a prompt, what is written behind it) -> whether the text has ended."""


def check_writing(config: SamplingConfig, model: str) -> None:
    """Raise UserError for a setting that would change what is written, and that only who writes by unmasking can heed."""
    for name in _REFUSED:
        if getattr(config, name) != SamplingConfig.__dataclass_fields__[name].default:
            raise UserError(
                f"{model} is autoregressive and writes from left to right: sampling.{name} is for those that unmask; leave it out"
            )


def settings_in_force(config: SamplingConfig) -> dict[str, Any]:
    """Of the settings those that are heeded."""
    return {**{name: getattr(config, name) for name in HEEDED}, "temperature": temperature_of(config)}


@torch.no_grad()
def write_left_to_right(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    *,
    never_ids: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    is_over: IsOver | None = None,
) -> list[list[int]]:
    """The token ids behind each prompt, which has at least one: `gen_length` of them, or as many as there are when `is_over`.

    Args:
        never_ids: not written.
        seed: of each prompt, or of the first; the same seed gives a prompt the same text in any company.

    Raises:
        UserError: ids outside of the vocabulary, or a prompt that leaves no room in the context.
        FloatingPointError: weights that are no numbers.
    """
    check_weights(model)
    assert all(prompts), "a network that is causal writes behind something"
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    check_room(config, int(lengths.max()), model.config.max_length)
    # What is to come stands on the right, where a causal network does not look.
    tokens = torch.zeros(len(prompts), int(lengths.max()) + config.gen_length, dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(list(prompt))
    check_tokens("write_left_to_right", model, tokens, torch.tensor(list(never_ids), dtype=torch.int64))
    device, temperature = device_of(model), temperature_of(config)
    keys = torch.tensor(seed_keys(seed, len(prompts)), dtype=torch.int64)
    written: list[list[int]] = [[] for _ in prompts]
    at_work = torch.arange(len(prompts))
    for step in range(config.gen_length):
        ends = lengths[at_work] + step
        fed = tokens[at_work, : int(ends.max())]
        last = torch.arange(len(fed)) * fed.shape[1] + ends - 1
        logits = model(fed.to(device), logits_at=last.to(device))
        logits[:, list(never_ids)] = -torch.inf
        # The noise belongs to the seed and the place.
        places = row_keys(keys[at_work], torch.full_like(at_work, step))
        found = draw_tokens(logits, temperature, places, cut=_cut(config, len(fed))).cpu()
        tokens[at_work, ends] = found
        for number, token in zip(at_work.tolist(), found.tolist(), strict=True):
            written[number].append(token)
        if is_over is not None:
            at_work = torch.tensor([n for n in at_work.tolist() if not is_over(n, written[n])])
        if not len(at_work):
            break
    return written


def _cut(config: SamplingConfig, rows: int) -> Cut:
    return Cut(
        torch.full((rows,), max(config.top_k, 0)),
        torch.full((rows,), config.top_p, dtype=torch.float64),
        torch.full((rows,), config.min_p, dtype=torch.float64),
    )


def complete_left_to_right(
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    *,
    stop: Sequence[str] = (),
    seed: int | Sequence[int] = 0,
    max_rows: int = 32,
    max_tokens: int = 4096,
) -> list[TextCompletion]:
    """Complete prompts up to their ends, as `complete_texts` does by unmasking; an empty one is an end of text.

    Args:
        stop: strings before which a text ends.
        max_rows, max_tokens: that one forward is fed, at least one row.

    Raises: see `write_left_to_right`.
    """
    ids = [prompt_ids(tokenizer, prompt) or start_of_text(tokenizer) for prompt in prompts]
    seeds = row_seeds(seed, len(ids))
    rows = max(1, min(max_rows, max_tokens // (max(map(len, ids), default=0) + config.gen_length)))
    found: list[TextCompletion] = []
    for at in range(0, len(ids), rows):
        part = slice(at, at + rows)
        found += _complete(model, tokenizer, prompts[part], ids[part], config, stop, seeds[part])
    return found


def _complete(
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    config: SamplingConfig,
    stop: Sequence[str],
    seeds: Sequence[int],
) -> list[TextCompletion]:
    ends, texts = frozenset(text_ends(model, tokenizer)), [""] * len(ids)
    replies = [
        Reply(tokenizer, start=0, length=config.gen_length, mask_id=_UNWRITTEN, end_ids=ends, stop=stop)
        for _ in ids
    ]

    def is_over(number: int, written: list[int]) -> bool:
        canvas = torch.full((config.gen_length,), _UNWRITTEN)
        canvas[: len(written)] = torch.tensor(written)
        texts[number] += replies[number].read(canvas)
        return replies[number].reason is not None

    never = never_written(tokenizer, config)
    written = write_left_to_right(model, ids, config, never_ids=never, seed=seeds, is_over=is_over)
    return [
        {
            "prompt": prompt,
            "text": text,
            "finish_reason": reply.reason or "length",
            "tokens": reply.num_committed,
            "nfe": len(row),
            "reveal_step": list(range(reply.num_committed)),
        }
        for prompt, text, reply, row in zip(prompts, texts, replies, written, strict=True)
    ]


def never_written(tokenizer: PreTrainedTokenizerFast, config: SamplingConfig) -> list[int]:
    """The mask, which a twin has a row for; and, as these settings have it, the end of a text (not that of a turn)."""
    ends = end_ids(tokenizer) - {turn_end(tokenizer)} if config.logits_eos_inf else set()
    mask = [] if tokenizer.mask_token_id is None else [int(tokenizer.mask_token_id)]
    return sorted({*mask, *ends})


def start_of_text(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What a text from nothing stands behind: the end of the one before, as in training. Raises UserError where there is none."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end of text, behind which a text from nothing would begin")
    return [int(tokenizer.eos_token_id)]
