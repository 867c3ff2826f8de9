"""The answer to a request that is refused or fails: an HTTP status and OpenAI's error object."""

from __future__ import annotations

from typing import Any

_TYPES = {
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_MAX_MESSAGE = 1000


class RequestError(Exception):
    """An answer with an HTTP status instead of a reply; `retry_after_s` becomes a Retry-After header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        message, param = shorten(self.message, _MAX_MESSAGE), self.param
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


def shorten(text: str, limit: int = 80) -> str:
    """What a client has sent, as far as a message repeats it."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
