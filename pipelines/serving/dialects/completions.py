"""POST /v1/completions: plain text or token ids, continued, or filled in before a suffix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from pipelines.serving.dialects.body import Prompt, SamplingBody
from pipelines.serving.dialects.writer import ReplyWriter

if TYPE_CHECKING:
    from pipelines.serving.prompts import PromptEncoder


class CompletionBody(SamplingBody):
    """With `suffix`, the reply is what stands between the prompt and it."""

    prompt: list[str | list[int]]
    """In the request also a string, or the token ids of one prompt."""
    suffix: str = ""
    echo: bool = False

    @property
    def num_prompts(self) -> int:
        return len(self.prompt)

    def prompts(self, encoder: PromptEncoder) -> list[Prompt]:
        suffix = encoder.encode_text(self.suffix, "suffix")
        prompts = []
        for given in self.prompt:
            if isinstance(given, str):
                ids, text = encoder.encode_text(given), given
            else:
                ids = encoder.check_ids(given)
                text = encoder.decode(ids) if self.echo else ""
            prompts.append(Prompt(ids, suffix, echo=text if self.echo else ""))
        return prompts

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

    def message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def no_delta(self) -> dict[str, Any]:
        return {"text": ""}


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
