"""What one request may ask for. All of it is known before a prompt is tokenised."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.serving.dialects.calls import AnyBody
from pipelines.serving.errors import RequestError


@dataclass(frozen=True)
class RequestLimits:
    """Of one request."""

    body_bytes: int = 4 << 20
    seconds: float = 3600.0
    """From its first byte to the last one of the answer."""
    choices: int = 32
    """Prompts × n."""
    messages: int = 1024
    """Turns of a conversation."""

    def check(self, body: AnyBody) -> None:
        """Raises RequestError 400."""
        if body.num_messages > self.messages:
            message = f"{body.num_messages:,} messages are more than the {self.messages:,} allowed"
            raise RequestError(400, message, param=body.prompt_field)
        if body.num_prompts * body.n > self.choices:
            message = (
                f"{body.num_prompts} prompts × n={body.n} are more than the {self.choices} choices allowed"
            )
            raise RequestError(400, message, param="n" if body.n > 1 else body.prompt_field)


DEFAULT_LIMITS = RequestLimits()
