"""POST /v1/completions: plain text or token ids, continued, or filled in before a suffix."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from llada.sampling.events import Token, show_bytes
from pipelines.serving.dialects.body import MAX_TOP, Likelihood, Prompt, SamplingBody
from pipelines.serving.dialects.writer import ReplyWriter
from pipelines.serving.errors import RequestError

if TYPE_CHECKING:
    from pipelines.serving.prompts import PromptEncoder


_MAX_PARTS, _MANY = 256, 1_000_000  # of a suffix; masks of a gap
_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        _IDS_SCHEMA | {"minItems": 1},
        {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, _IDS_SCHEMA]}},
    ]
}


_SUFFIX_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "maxItems": _MAX_PARTS,
            "items": {
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {"type": "integer", "minimum": 1, "maximum": _MANY},
                ]
            },
        },
    ]
}


class CompletionBody(SamplingBody):
    """With `suffix`, the reply is what stands between the prompt and it."""

    prompt: Annotated[list[str | list[int]], WithJsonSchema(_PROMPT_SCHEMA)]
    """A text or its token ids, or a list of such prompts."""
    suffix: Annotated[str | list[str | int], WithJsonSchema(_SUFFIX_SCHEMA)] = ""
    """What follows the reply. Ours: a list of texts and, between them, numbers of masks has further gaps; then max_tokens is the
    length of the first one, the reply is everything from it to the last text, and each choice has its `gaps`."""
    max_tokens: int | None = Field(None, ge=0)
    """With echo it may be 0: the prompt alone."""
    echo: bool = False
    """Begin the reply with the prompt; with logprobs, tell its likelihood."""
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    """For each token its log-probability in the forward that unmasked it, at temperature 1 among what may stand there, and
    those of so many of the likeliest ones. Of the tokens of an echoed prompt those of the chain rule: each given the ones
    before it, with masks in the place of the others; a forward for each token."""
    likelihood_from: int = Field(0, ge=0)
    """Ours, of an echoed prompt: the first token whose likelihood is asked for; those before are given."""
    likelihood_samples: int | None = Field(None, ge=1, le=1024)
    """Ours, of an echoed prompt: not the chain rule but LLaDA's Monte-Carlo bound from so many sampled masks, shared out among
    the tokens; a forward for each sample."""

    @property
    def num_top(self) -> int | None:
        return self.logprobs

    @property
    def num_gaps(self) -> int:
        # The first one is in front of the list.
        return 1 + len(self.suffix) // 2 if isinstance(self.suffix, list) else 0

    @property
    def likelihood(self) -> Likelihood | None:
        if not self.echo or self.logprobs is None:
            return None
        return Likelihood(self.likelihood_from, self.likelihood_samples)

    @property
    def num_prompts(self) -> int:
        return len(self.prompt)

    def prompts(self, encoder: PromptEncoder) -> list[Prompt]:
        parts = [self.suffix] if isinstance(self.suffix, str) else self.suffix
        behind = [part if isinstance(part, int) else encoder.encode_text(part, "suffix") for part in parts]
        suffix = behind.pop() if not isinstance(behind[-1], int) else []
        assert not isinstance(suffix, int)
        prompts = []
        for given in self.prompt:
            if isinstance(given, str):
                ids, text = encoder.encode_text(given), given
            else:
                ids = encoder.check_ids(given)
                text = encoder.decode(ids) if self.echo else ""
            prompts.append(Prompt(ids, suffix, tuple(behind), text if self.echo else None))
        return prompts

    @model_validator(mode="after")
    def _refuse_what_needs_another(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise RequestError(400, "max_tokens=0 goes with echo=true", param="max_tokens")
        if self.max_tokens == 0:
            self._refuse_knobs_of_a_reply()
        for name in ("likelihood_from", "likelihood_samples"):
            if name in self.model_fields_set and self.likelihood is None:
                raise RequestError(400, f"{name} goes with echo=true and logprobs", param=name)
        if self.likelihood is not None and self.suffix:
            message = "suffix: the likelihood of a prompt is told of what nothing follows"
            raise RequestError(400, message, param="suffix")
        if self.likelihood_samples and self.logprobs:
            message = "a token has no alternatives in a Monte-Carlo likelihood: send logprobs=0"
            raise RequestError(400, message, param="logprobs")
        return self

    def _refuse_knobs_of_a_reply(self) -> None:
        """Where none is written they would change nothing. But a likelihood has guidance, and the temperature may be said
        that it is told at, or that of a client which wants no chance in it."""
        given: dict[str, Any] = self.knobs() | {
            name: value for name in ("stop", "stop_token_ids", "ignore_eos") if (value := getattr(self, name))
        }
        if self.likelihood is not None:
            given.pop("cfg_scale", None)
        if given.get("temperature") in (0, 1):
            del given["temperature"]
        if given:
            name = next(iter(given))
            message = f"{name} is a setting of replies, and max_tokens=0 asks for none"
            raise RequestError(400, message, param=name)

    @field_validator("suffix")
    @classmethod
    def _check_parts(cls, suffix: str | list[str | int]) -> str | list[str | int]:
        if isinstance(suffix, list):
            if not 1 <= len(suffix) <= _MAX_PARTS:
                raise ValueError(f"a list of gaps has 1 to {_MAX_PARTS} parts")
            for place, part in enumerate(suffix):
                if isinstance(part, int) != bool(place % 2):
                    raise ValueError("a list of gaps is texts and numbers of masks in turn, a text first")
                if part == "" or (isinstance(part, int) and not 1 <= part <= _MANY):
                    raise ValueError(f"a gap has 1 to {_MANY:,} masks, and a text between gaps some letters")
        return suffix

    @model_validator(mode="after")
    def _check_gaps(self) -> Self:
        if self.has_gaps:
            if not self.max_tokens:
                message = "a list of gaps needs max_tokens, the length of the first one"
                raise RequestError(400, message, param="max_tokens")
            for name in ("fixed", "initial_length", "stop"):
                if getattr(self, name):
                    raise RequestError(400, f"{name} does not go with a list of gaps", param=name)
        return self

    @field_validator("logprobs", mode="before")
    @classmethod
    def _false_is_none(cls, logprobs: Any) -> Any:
        """What clients send here that mean a chat's field: it asks for nothing."""
        return None if logprobs is False else logprobs

    @field_validator("prompt", mode="before")
    @classmethod
    def _list_prompts(cls, prompt: Any) -> Any:
        if isinstance(prompt, str):
            return [prompt]
        wrong = "must be a string, a list of strings, or a list of token ids or of such lists"
        if not isinstance(prompt, list):
            raise ValueError(wrong)
        if not prompt:
            raise ValueError("must not be empty; an unconditional sample has the prompt ''")
        if all(_is_id(item) for item in prompt):
            return [prompt]
        if not all(
            isinstance(item, str) or (isinstance(item, list) and all(_is_id(i) for i in item))
            for item in prompt
        ):
            raise ValueError(wrong)
        return prompt


class CompletionWriter(ReplyWriter):
    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"
    # lm_eval asks for one token behind a prompt and takes the last entry for it, be it EOS.
    tells_end = True

    def __init__(self, body: SamplingBody, model_id: str) -> None:
        super().__init__(body, model_id)
        self._places: dict[int, tuple[codecs.IncrementalDecoder, int]] = {}

    def logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        """OpenAI's lists, one entry for each token; `text_offset` is where the character stands in the choice's text that the
        token begins, or goes on with."""
        decoder, offset = self._places.get(index) or (codecs.getincrementaldecoder("utf-8")("replace"), 0)
        offsets = []
        for token in tokens:
            offsets.append(offset)
            if not token.is_special:
                offset += len(decoder.decode(token.raw))
        self._places[index] = decoder, offset
        tops: list[dict[str, float] | None] = []
        for token in tokens:
            top: dict[str, float] = {}
            for spelled, value in token.top:
                top.setdefault(show_bytes(spelled), value)  # of tokens that read alike, the likelier one
            tops.append(None if token.logprob is None else top)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops if self.body.num_top else None,
            "text_offset": offsets,
        }

    def message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def no_delta(self) -> dict[str, Any]:
        return {"text": ""}


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
