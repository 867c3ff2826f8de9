"""What the engine is asked for a body: prompts as token ids, a canvas for each choice, the defaults with what the request says."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from llada.errors import UserError
from llada.model.predict import network_block
from llada.sampling.blocks import count_blocks
from llada.sampling.config import SamplingConfig
from llada.sampling.engine import DenoiseEngine
from llada.sampling.length import OF_GROWING
from llada.sampling.request import GenerateRequest
from llada.sampling.rules import RULE_OF_KNOB, RULE_SETTINGS
from llada.sampling.text import spell_fixed
from pipelines.serving.dialects.body import Prompt, SamplingBody
from pipelines.serving.errors import RequestError
from pipelines.serving.json_canvas import JsonCanvas, Vocabulary
from pipelines.serving.prompts import PromptEncoder

_MOST_LOGPROBS = 1 << 18  # of an answer: some 16 MB, and ten times that where it is put together


def _default(*names: str) -> dict[str, Any]:
    """{name: what it is where nobody sets it} of settings."""
    return {field.name: field.default for field in dataclasses.fields(SamplingConfig) if field.name in names}


_NOT_GROWING = _default("initial_length", *OF_GROWING)


class RequestReader:
    """Of one model. All errors are RequestErrors 400."""

    def __init__(
        self,
        engine: DenoiseEngine,
        encoder: PromptEncoder,
        sampling: SamplingConfig,
        *,
        vocab_size: int,
        max_prompt_tokens: int | None,
    ) -> None:
        """`sampling`, `max_prompt_tokens`: as of the Denoiser; `vocab_size`: the network's."""
        self._engine, self._encoder, self.sampling = engine, encoder, sampling
        self._vocab_size, self._max_prompt_tokens = vocab_size, max_prompt_tokens

    def requests_of(self, body: SamplingBody) -> tuple[list[Prompt], list[GenerateRequest]]:
        """What the request continues, and `n` requests to the engine for each prompt. Raises RequestError (400)."""
        ends = frozenset() if body.ignore_eos else self._engine.end_ids
        ends |= self._encoder.find_stop_tokens(body.stop) | self._encoder.check_stop_ids(body.stop_token_ids)
        prompts = body.prompts(self._encoder)
        requests = []
        for prompt in prompts:
            _check_between(prompt, ends)
            if self._max_prompt_tokens is not None:
                given = [token for part in prompt.between if not isinstance(part, int) for token in part]
                self._encoder.check_length(prompt.ids, [*given, *prompt.suffix], body.prompt_field)
            fit, frame = self._fit(body, prompt), None
            if body.json_schema is not None:
                frame = self._frame(body, body.json_schema, fit)
            sampling = self._choose_sampling(body, prompt, frame, ends)
            if fit == 0:
                continue
            requests += [
                GenerateRequest(
                    prompt.ids,
                    sampling,
                    prompt.suffix,
                    # Below 2⁶³, which every torch generator takes; the same for each prompt of a list.
                    seed=None if body.seed is None else (body.seed + choice) % 2**63,
                    stop=tuple(body.stop),
                    # What is written in a frame ends nowhere before its end.
                    end_ids=ends if frame is None else frozenset(),
                    slots=None if frame is None else frame.slots,
                    wants_drafts=body.stream_options.include_drafts,
                    wants_trace=body.tells_tokens or frame is not None,
                    num_top=body.num_top or 0,
                )
                for choice in range(body.n)
            ]
        _check_told(body, prompts, requests)
        return prompts, requests

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Of JSON replies. Raises RequestError where the model cannot write any."""
        special, fill = self._encoder.special_ids, self._engine.eos_id
        if fill not in special:
            message = "the model has no end-of-text token that does not show, with which values are filled up"
            raise RequestError(400, f"response_format: {message}", param="response_format")
        return Vocabulary(
            self._engine.token_bytes,
            special,
            self._vocab_size,
            fill,
            partial(self._encoder.encode_text, field="response_format"),
        )

    def _frame(self, body: SamplingBody, schema: Mapping[str, Any], fit: int) -> JsonCanvas:
        """Of a reply of so many tokens. Raises RequestError, in the names of the client."""
        try:
            return JsonCanvas(schema, self.vocabulary, fit, body.limit_field)
        except RequestError as error:
            if error.message.startswith("response_format"):
                error.message = body.format_field + error.message.removeprefix("response_format")
            if error.param == "response_format":
                error.param = body.format_field
            raise

    def _choose_sampling(
        self, body: SamplingBody, prompt: Prompt, frame: JsonCanvas | None, ends: frozenset[int]
    ) -> SamplingConfig:
        """The defaults with what the request asks for. Raises RequestError for contradictions."""
        # Where no reply is asked for, its knobs must be good all the same.
        asked, gen_length = body.knobs(), self._fit(body, prompt) or self.sampling.gen_length
        if frame is not None:
            gen_length = frame.length
            asked |= _NOT_GROWING | _default("suffix_window", "logits_eos_inf", "allowed", "forbidden")
            asked["fixed"] = frame.fixed
        elif prompt.between:
            gen_length, asked["fixed"] = self._lay_gaps(prompt, gen_length)
        if frame is None:
            asked = self._settle_growth(body, prompt, gen_length, ends) | asked
        # A rule of the request replaces the default one, whether it goes by its name or by its knob, and its numbers.
        if "remasking" in asked or RULE_OF_KNOB.keys() & asked.keys():
            asked = _default(*RULE_SETTINGS) | asked
        try:
            # Spelled here, once for all choices, and not in the engine's event loop.
            sampling = spell_fixed(self._engine.tokenizer, self._with_defaults(gen_length, asked))
        except UserError as error:
            # What stands between gaps is a setting to the sampler.
            told = str(error).replace("fixed", "suffix") if prompt.between else str(error)
            raise RequestError(400, told, param=blamed_knob(body, error)) from None
        blocks = count_blocks(sampling, len(prompt.ids), network_block(self._engine.model))
        if (steps := asked.get("steps")) is not None and steps < blocks:
            message = (
                f"steps {steps} is too few: {gen_length} tokens are {blocks} blocks of block_length "
                f"{sampling.block_length}, of which each takes a step"
            )
            raise RequestError(400, message, param="steps")
        # The endpoint's own steps are for its own length.
        if sampling.steps is not None and sampling.steps < blocks:
            sampling = dataclasses.replace(sampling, steps=blocks)
        return sampling

    def _with_defaults(self, gen_length: int, asked: Mapping[str, Any]) -> SamplingConfig:
        """What is asked for, the endpoint's settings aside; those of a growing canvas give way to what does not go with one. Raises
        UserError."""
        try:
            return dataclasses.replace(self.sampling, gen_length=gen_length, **asked)
        except UserError:
            if "initial_length" in asked:
                raise
            return dataclasses.replace(self.sampling, gen_length=gen_length, **{**_NOT_GROWING, **asked})

    def _settle_growth(
        self, body: SamplingBody, prompt: Prompt, gen_length: int, ends: frozenset[int]
    ) -> dict[str, Any]:
        """What the endpoint's own settings of a growing canvas become where this reply cannot grow. Raises RequestError where
        the request itself has set its first length, which would change nothing or be looked at in vain."""
        own = body.knobs().get("initial_length")
        if not ends:
            why = "needs an end of the text, by which it is seen that no more masks are needed, and "
            why += (
                "ignore_eos=true leaves none: send stop_token_ids too"
                if body.ignore_eos
                else "this model has none"
            )
        elif prompt.suffix or prompt.between:
            why = "means nothing where a text stands behind the reply: leave it out, or suffix"
        elif (first := own or self.sampling.initial_length or 0) >= gen_length:
            why = f"{first} means nothing to a reply of at most {gen_length} tokens: it must be below that"
        else:
            return {}
        if own is not None:
            raise RequestError(400, f"initial_length {why}", param="initial_length")
        return _NOT_GROWING

    def _lay_gaps(self, prompt: Prompt, first: int) -> tuple[int, dict[int, int]]:
        """The length of a reply with several gaps, and the ids that stand between them."""
        place, fixed = first, dict[int, int]()
        for part in prompt.between:
            if not isinstance(part, int):
                fixed |= dict(enumerate(part, start=place))
            place += part if isinstance(part, int) else len(part)
        return place, fixed

    def _fit(self, body: SamplingBody, prompt: Prompt) -> int:
        """Masks that the reply may have. Raises RequestError when the context length has no room for them."""
        limit = body.token_limit
        room = self._encoder.context_length - len(prompt.ids) - len(prompt.suffix) - prompt.num_between
        if room >= (1 if limit is None else limit):
            return min(self.sampling.gen_length, room) if limit is None else limit
        behind = len(prompt.suffix) + prompt.num_between
        given = f"{len(prompt.ids)} tokens" + (f" and the suffix {behind}" if behind else "")
        message = (
            f"the model's context length is {self._encoder.context_length} tokens, but the prompt has {given}"
        )
        if limit is not None:
            message += f" and {body.limit_field} asks for {limit} more"
        raise RequestError(400, message, param=body.prompt_field, code="context_length_exceeded")


def _check_told(body: SamplingBody, prompts: Sequence[Prompt], requests: Sequence[GenerateRequest]) -> None:
    """Raises RequestError for more log-probabilities than an answer has."""
    if body.num_top is None:
        return
    tokens = sum(request.sampling.gen_length for request in requests)
    if body.likelihood is not None:
        tokens += body.n * sum(len(prompt.ids) for prompt in prompts)
    if (told := tokens * (1 + body.num_top)) > _MOST_LOGPROBS:
        message = (
            f"the answer would tell {told:,} log-probabilities, and at most {_MOST_LOGPROBS:,} are told: "
            "ask for fewer choices, tokens or alternatives"
        )
        raise RequestError(
            400, message, param="top_logprobs" if body.prompt_field == "messages" else "logprobs"
        )


def _check_between(prompt: Prompt, ends: frozenset[int]) -> None:
    """Raises RequestError for text between gaps at which the reply would end."""
    for part in prompt.between:
        if not isinstance(part, int) and (met := ends.intersection(part)):
            message = f"suffix: the text between two gaps holds the token id {min(met)}, which ends a reply"
            raise RequestError(400, message, param="suffix")


def blamed_knob(body: SamplingBody, error: UserError) -> str | None:
    """The knob of the request that the error is about; None where it names several, or one that was not sent."""
    named = [name for name in body.knobs() if re.search(rf"\b{name}\b", str(error))]
    return named[0] if len(named) == 1 else None
