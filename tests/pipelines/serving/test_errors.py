"""OpenAI's error object."""

from __future__ import annotations

from pipelines.serving.errors import RequestError, shorten


def test_request_errors_have_openais_form() -> None:
    body = RequestError(429, "later", code="queue_full", retry_after_s=5).body()
    assert body == {
        "error": {"message": "later", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    }
    assert RequestError(404, "none").body()["error"]["type"] == "invalid_request_error"
    assert RequestError(408, "slow").body()["error"]["type"] == "timeout_error"


def test_a_message_is_no_longer_than_anybody_reads() -> None:
    assert len(RequestError(400, "x" * 10**6).body()["error"]["message"]) == 1000
    assert shorten("x" * 80) == "x" * 80
    assert shorten("x" * 81) == "x" * 79 + "…"
