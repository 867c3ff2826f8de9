"""OpenAI's error object."""

from __future__ import annotations

from pipelines.serving.errors import RequestError


def test_request_errors_have_openais_form() -> None:
    body = RequestError(429, "later", code="queue_full", retry_after_s=5).body()
    assert body == {
        "error": {"message": "later", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    }
    assert RequestError(404, "none").body()["error"]["type"] == "invalid_request_error"
