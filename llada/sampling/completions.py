"""Many prompts, completed: what batch inference and evaluation call, around the engine's batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from transformers import PreTrainedTokenizerFast

from llada.errors import UserError
from llada.model.predict import check_tokens, check_weights
from llada.model.transformer import Transformer
from llada.sampling.batch import Batch, Group, Run
from llada.sampling.canvas import prompt_canvas
from llada.sampling.config import SamplingConfig, check_room, check_window
from llada.sampling.constraints import named_ids
from llada.sampling.events import FinishReason
from llada.sampling.generate import held_back
from llada.sampling.inputs import row_seeds
from llada.sampling.prefixes import PrefixStore
from llada.sampling.reply import Reply
from llada.sampling.sampler import advance
from llada.sampling.text import Prompt, prompt_ids, spell_fixed, text_ends, turn_end
from llada.settings import require


class TextCompletion(TypedDict):
    """A line of samples.jsonl."""

    prompt: Prompt
    text: str
    finish_reason: FinishReason
    tokens: int
    nfe: int
    reveal_step: list[int]
    """The forward, from 0, at which each of its tokens was committed; -1: it was given."""


class _Line(Run):
    def __init__(self, number: int, reply: Reply) -> None:
        super().__init__(reply, Group())
        self.number, self.text = number, ""


def complete_texts(
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    *,
    suffixes: Sequence[Sequence[int]] | None = None,
    tools: Sequence[Sequence[Any]] | None = None,
    stop: Sequence[str] = (),
    seed: int | Sequence[int] = 0,
    max_rows: int = 32,
    max_tokens: int = 4096,
    batch_invariant: bool = False,
) -> list[TextCompletion]:
    """Complete prompts; a reply that has ended makes room for the next one.

    Args:
        suffixes: token ids behind each text, which then fills the gap; an end of text ends what stands in it.
        tools: those of each prompt that is a conversation.
        stop: strings before which a text ends.
        seed: of each prompt, or of the first; the same seed gives a prompt the same text in any company.
        max_rows, max_tokens: replies on the canvas at a time, and tokens that one forward is fed.
        batch_invariant: rounding does not depend on the company either (`forward`).

    Raises:
        UserError: a prompt that leaves no room, beside its suffix, for `config.gen_length` tokens in the model's context.
        FloatingPointError: weights or logits that are no numbers.
    """
    ids = [
        prompt_ids(tokenizer, prompt, tools=can_call)
        for prompt, can_call in zip(prompts, tools or [()] * len(prompts), strict=True)
    ]
    behind = [list(suffix) for suffix in suffixes or [()] * len(ids)]
    given = [before + after for before, after in zip(ids, behind, strict=True)]
    check_room(config, max(map(len, given), default=0), model.config.max_length)
    check_window(config, is_given_behind=any(behind))
    for row in given:
        check_tokens("generate", model, torch.tensor(row, dtype=torch.int64))
    ends, mask_id = text_ends(model, tokenizer), tokenizer.mask_token_id
    config = spell_fixed(tokenizer, config)
    for name, named in named_ids(config).items():
        check_tokens(f"sampling: {name}", model, named)
    held = held_back(config, ends, turn_end(tokenizer))
    seeds = row_seeds(seed, len(ids))
    if len(seeds) != len(ids):
        raise UserError(f"sampling: {len(seeds)} seeds for {len(ids)} prompts; give one for each")
    for name, value in {"max_rows": max_rows, "max_tokens": max_tokens}.items():
        require(value >= 1, f"sampling: {name} must be at least 1, not {value}")
    check_weights(model)
    batch, prefixes = Batch(max_tokens=max_tokens), PrefixStore()
    waiting = deque(range(len(ids)))
    results: dict[int, TextCompletion] = {}
    while waiting or batch.runs:
        joining = [waiting.popleft() for _ in range(min(len(waiting), max_rows - len(batch.runs)))]
        replies = [
            Reply(
                tokenizer,
                start=len(ids[number]),
                length=config.gen_length,
                mask_id=mask_id,
                end_ids=frozenset(ends),
                stop=stop,
            )
            for number in joining
        ]
        canvases = [
            prompt_canvas(
                [ids[number]],
                config,
                mask_id=mask_id,
                eos_id=ends,
                suffix=behind[number],
                seed=[seeds[number]],
                network_block=model.config.block_length,
                **held,
            )
            for number in joining
        ]
        batch.add([_Line(*line) for line in zip(joining, replies, strict=True)], canvases)
        step, brought_on = batch.plan(), []
        if step is not None and batch.canvas is not None:
            brought_on = advance(model, batch.canvas, step, prefixes, batch_invariant=batch_invariant)
        for line, tokens, final_until, forwards, *_ in batch.progress(brought_on):
            assert isinstance(line, _Line)
            assert batch.canvas is not None
            line.text += line.reply.read(tokens, final_until)
            if line.reply.reason is not None:
                start = len(ids[line.number])
                steps = batch.canvas.reveal_step[batch.runs.index(line), start:]
                results[line.number] = {
                    "prompt": prompts[line.number],
                    "text": line.text,
                    "finish_reason": line.reply.reason,
                    "tokens": line.reply.num_committed,
                    "nfe": forwards,
                    "reveal_step": steps[: line.reply.num_committed].tolist(),
                }
        batch.keep(lambda run: run.reply.reason is None)
    return [results[number] for number in range(len(ids))]
