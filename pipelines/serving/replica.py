"""One copy of the model behind the endpoint: a request body in, events of its replies out.

It knows the tokenizer, the context length and the default sampling; Ray Serve runs it (pipelines/serve.py), and
without Ray it is an ordinary object.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import jinja2
import torch

import llada
from llada.errors import UserError
from llada.sampling.engine import Completion, Delta, DenoiseEngine, GenerateRequest
from llada.sampling.sampler import SamplingConfig
from llada.tokenizer import encode_texts, render_chat
from pipelines.serving.events import Event, Finished, Refused, Started, Text
from pipelines.serving.openai_api import ChatBody, CompletionBody, RequestError, SamplingBody
from pipelines.stage.artifact import fetch_folder

_RULES = ("threshold", "factor", "entropy_bound")  # at most one may be set
_KNOBS = ("steps", "block_length", "temperature", "cfg_scale", "remasking", *_RULES)


@dataclasses.dataclass(frozen=True)
class SamplingDefaults:
    """What a request gets that does not say otherwise. As in LLaDA's generate.py, except for the shorter blocks."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012

    max_tokens: int = 128
    """Masks after the prompt, fewer where the context is nearly full."""
    steps: int | None = None
    """Forwards; None takes one for each token."""
    block_length: int = 32
    """Blocks are finished left to right: a stream grows at least once in a block."""
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    threshold: float | None = None
    """Fast-dLLM: commit every token whose confidence is at least this. At most one of the three rules."""
    factor: float | None = None
    entropy_bound: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for contradictions."""
        if self.block_length < 1:
            raise ValueError(f"sampling: block_length must be at least 1, not {self.block_length}")
        self.config({}, self.max_tokens)

    def config(self, asked: Mapping[str, Any], gen_length: int) -> SamplingConfig:
        """The sampling of a request that sets `asked`. Raises ValueError for contradictions."""
        values = {name: getattr(self, name) for name in _KNOBS}
        # A rule of the request replaces the default one; so does an order of unmasking that knows no rule.
        if (
            any(name in asked for name in _RULES)
            or asked.get("remasking", "low_confidence") != "low_confidence"
        ):
            values |= dict.fromkeys(_RULES)
        values |= asked
        # The loop gives every block as many steps: for one token each, count the last, short block as a whole one.
        whole = -(-gen_length // values["block_length"]) * values["block_length"]
        return SamplingConfig(**{**values, "gen_length": gen_length, "steps": values["steps"] or whole})


class Denoiser:
    """The model at `model_url`, loaded once, and the engine that runs it."""

    def __init__(
        self,
        model_url: str,
        sampling: SamplingDefaults,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        max_concurrent: int = 8,
        max_choices: int = 32,
        stall_timeout_s: float = 600.0,
    ) -> None:
        """
        Args:
            dtype: of the weights, e.g. "bfloat16"; None keeps the file's.
            max_choices: prompts × n of one request at the most.
            stall_timeout_s: a forward that takes longer makes the health check fail.

        Raises:
            UserError: no model there, or one that cannot be served.
        """
        folder = fetch_folder(model_url)
        try:
            model, tokenizer = llada.load(
                folder, device=device, dtype=getattr(torch, dtype) if dtype else None
            )
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"cannot serve {model_url}: {error}") from error
        if tokenizer is None:
            raise UserError(f"cannot serve {model_url}: it has no tokenizer.json")
        self.tokenizer, self.sampling, self.max_choices = tokenizer, sampling, max_choices
        self.stall_timeout_s = stall_timeout_s
        self.max_length = model.config.max_length
        self.vocab_size = model.config.vocab_size
        self.engine = DenoiseEngine(model, tokenizer, max_concurrent=max_concurrent)

    def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        self.engine.check(stall_timeout_s=self.stall_timeout_s)

    def close(self) -> None:
        self.engine.close()

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close()

    async def stream(self, body: SamplingBody) -> AsyncGenerator[Event, None]:
        """The events of all choices, or one `Refused`. Choice i answers prompt i // n. Leaving early cancels them."""
        try:
            # In a thread: tokenising a long text must not hold up the streams of the others.
            requests, echoes = await asyncio.to_thread(self.prepare, body)
        except RequestError as error:
            yield Refused(error.status, error.message, error.param, error.code)
            return
        started = False
        events = self.engine.stream(*requests)
        try:
            async for event in events:
                if not started:
                    started = True
                    yield Started()
                if isinstance(event, Delta):
                    text = echoes[event.index] + event.text
                    echoes[event.index] = ""
                    if text or event.canvas is not None:
                        yield Text(event.index, text, event.canvas)
                elif isinstance(event, Completion):
                    yield Finished(
                        event.index,
                        event.finish_reason,
                        # The choices of one prompt share it: it counts once.
                        event.prompt_tokens if event.index % body.n == 0 else 0,
                        event.completion_tokens,
                        event.nfe,
                    )
        finally:
            await events.aclose()

    def prepare(self, body: SamplingBody) -> tuple[list[GenerateRequest], list[str]]:
        """The engine's requests, and the text that each reply begins with. Raises RequestError (400)."""
        prompts, suffix, echoes = self._read_prompts(body)
        if len(prompts) * body.n > self.max_choices:
            message = (
                f"{len(prompts)} prompts × n={body.n} are more than the {self.max_choices} choices allowed"
            )
            raise RequestError(400, message, param="n")
        asked = {name: value for name in _KNOBS if (value := getattr(body, name)) is not None}
        requests = []
        for prompt in prompts:
            gen_length = self._fit(len(prompt), len(suffix), body.max_tokens)
            try:
                sampling = self.sampling.config(asked, gen_length)
            except ValueError as error:
                raise RequestError(400, str(error)) from None
            requests += [
                GenerateRequest(
                    prompt,
                    sampling,
                    suffix,
                    # Below 2⁶³, which every torch generator takes; the same for each prompt of a list.
                    seed=None if body.seed is None else (body.seed + choice) % 2**63,
                    stop=tuple(body.stop),
                    wants_canvas=body.stream_options.include_canvas,
                )
                for choice in range(body.n)
            ]
        return requests, [echo for echo in echoes for _ in range(body.n)]

    def _read_prompts(self, body: SamplingBody) -> tuple[list[list[int]], list[int], list[str]]:
        if isinstance(body, ChatBody):
            messages = [{"role": m.role, "content": m.content} for m in body.messages]
            try:
                return [render_chat(self.tokenizer, messages)], [], [""]
            except (ValueError, jinja2.TemplateError) as error:
                raise RequestError(400, str(error), param="messages") from None
        assert isinstance(body, CompletionBody)
        texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
        encoded = iter(encode_texts(self.tokenizer, texts))
        prompts = [next(encoded) if isinstance(p, str) else self._check_ids(p) for p in body.prompt]
        suffix = encode_texts(self.tokenizer, [body.suffix])[0] if body.suffix else []
        if not body.echo:
            return prompts, suffix, [""] * len(prompts)
        echoes = [
            p if isinstance(p, str) else str(self.tokenizer.decode(p, skip_special_tokens=True))
            for p in body.prompt
        ]
        return prompts, suffix, echoes

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        for token in ids:
            if not 0 <= token < self.vocab_size:
                message = f"prompt: token id {token} lies outside the vocabulary of {self.vocab_size}"
                raise RequestError(400, message, param="prompt")
            if token == self.engine.mask_id:
                message = f"prompt: token id {token} is the mask; to fill a gap, send prompt and suffix"
                raise RequestError(400, message, param="prompt")
        return list(ids)

    def _fit(self, prompt: int, suffix: int, max_tokens: int | None) -> int:
        """Masks that the reply may have. Raises RequestError when the context length has no room for them."""
        room = self.max_length - prompt - suffix
        if room >= (max_tokens or 1):
            return max_tokens or min(self.sampling.max_tokens, room)
        given = f"{prompt} tokens" + (f" and the suffix {suffix}" if suffix else "")
        message = f"the model's context length is {self.max_length} tokens, but the prompt has {given}"
        if max_tokens is not None:
            message += f" and max_tokens asks for {max_tokens} more"
        raise RequestError(400, message, param="prompt", code="context_length_exceeded")
