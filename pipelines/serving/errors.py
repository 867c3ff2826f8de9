"""The answer to a request that is refused or fails: an HTTP status and OpenAI's error object."""

from __future__ import annotations

from typing import Any

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}


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

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
