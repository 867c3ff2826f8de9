"""API keys: who may ask, and how much each may ask in a minute. Without keys, everybody may.

A key is looked for among all of them in a time that does not depend on which it is, and is held as its SHA-256 alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from llada.errors import UserError
from llada.settings import load_text
from pipelines.serving.errors import RequestError

_log = logging.getLogger(__name__)
_ENVIRONMENT = "env:"
_SHORTEST = 8
# What strangers may see: that somebody answers, how much there is to do, and the page, which asks for the key.
_OPEN = frozenset({"/", "/health", "/metrics", "/docs", "/openapi.json"})
_PAGE_FILES = "/static/"


@dataclass(frozen=True)
class KeyLimits:
    """Of each key; None: no limit."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    """Of prompts and replies together."""


def load_keys(source: str) -> list[str]:
    """The keys in a file at any fsspec URL, one a line (empty lines and those that begin with # are none), or, of
    "env:NAME", in that variable. Raises UserError for a bad one, which is named by its line and never shown."""
    if source.startswith(_ENVIRONMENT):
        name = source.removeprefix(_ENVIRONMENT)
        if name not in os.environ:
            raise UserError(f"api_keys: there is no environment variable {name!r}")
        place, text = f"${name}", os.environ[name]
    else:
        place, text = source, load_text(source, "file of API keys")
    keys: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        where = f"{place}, line {number}"
        if len(key) < _SHORTEST or not (key.isascii() and key.isprintable()) or " " in key:
            raise UserError(
                f"{where}: a key has at least {_SHORTEST} characters, all printable ASCII and no space"
            )
        if key in keys:
            raise UserError(f"{where}: the key of line {keys[key]} again")
        keys[key] = number
    if not keys:
        raise UserError(
            f"{place} holds no API key: write one a line, or leave api_keys out to serve everybody"
        )
    return list(keys)


class Bucket:
    """So many units a minute, and as many at once. What is taken may be more than there is: the debt is waited for."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._most, self._clock = per_minute / 60, per_minute, clock
        self._level, self._seen = per_minute, clock()

    def wait_s(self, units: float = 0.0) -> float:
        """Seconds until so many units are there (or, of 0, until there is no debt); 0: they are."""
        now = self._clock()
        self._level = min(self._most, self._level + (now - self._seen) * self._rate)
        self._seen = now
        missing = min(units, self._most) - self._level
        return max(0.0, missing / self._rate)

    def take(self, units: float) -> None:
        self._level -= units


class Account:
    """One key's share of the endpoint."""

    def __init__(self, name: str, limits: KeyLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        """Of the key in logs: the beginning of its SHA-256."""
        requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
        self._limits = limits
        self._requests = None if requests is None else Bucket(requests, clock)
        self._tokens = None if tokens is None else Bucket(tokens, clock)

    def admit(self) -> None:
        """Take a request. Raises RequestError 429 when the minute's requests or tokens are used up."""
        waits: list[tuple[float, str]] = []
        if self._requests is not None:
            waits.append((self._requests.wait_s(1), f"{self._limits.requests_per_minute:g} requests"))
        if self._tokens is not None:
            waits.append((self._tokens.wait_s(), f"{self._limits.tokens_per_minute:g} tokens"))
        wait_s, what = max(waits, default=(0.0, ""))
        if wait_s > 0:
            raise RequestError(
                429,
                f"this key's {what} per minute are used up",
                code="rate_limit_exceeded",
                retry_after_s=math.ceil(wait_s),
            )
        if self._requests is not None:
            self._requests.take(1)

    def charge(self, tokens: int) -> None:
        """Tokens that a request of this key has taken, known when they are there."""
        if self._tokens is not None:
            self._tokens.take(tokens)


class Accounts:
    """Those of all good keys."""

    def __init__(self, keys: Sequence[str], limits: KeyLimits) -> None:
        self._limits = limits
        self._by_digest: dict[bytes, Account] = {}
        self.replace(keys)

    def replace(self, keys: Sequence[str]) -> None:
        """From now on these keys are good. One that was so before goes on with what it has used up."""
        self._by_digest = {
            digest: self._by_digest.get(digest) or Account(digest.hex()[:8], self._limits)
            for digest in map(_digest, keys)
        }

    def find(self, key: str) -> Account | None:
        """The account of a key, in a time that does not depend on which it is; None: it is not good."""
        given, found = _digest(key), None
        for digest, account in self._by_digest.items():
            if hmac.compare_digest(digest, given):
                found = account
        return found


async def follow_keys(source: str, accounts: Accounts, every_s: float) -> None:
    """For ever: what stands at `source` (see `load_keys`) now is good. What cannot be read, or is no list of keys, changes
    nothing, and is one line of the log."""
    told = ""
    while True:
        await asyncio.sleep(every_s)
        try:
            keys = await asyncio.to_thread(load_keys, source)
        except UserError as error:
            if str(error) != told:
                _log.warning("the API keys of before stay: %s", error)
            told = str(error)
        else:
            told = ""
            accounts.replace(keys)


class Guard:
    """ASGI middleware: without a good key, nothing but `_OPEN` is answered. The account is in the scope's state."""

    def __init__(self, app: ASGIApp, *, accounts: Accounts, refused: Callable[[str, int], None]) -> None:
        """`refused` is told the path and the status of what is not let through."""
        self._app, self._accounts, self._refused = app, accounts, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "http"
            and scope["path"] not in _OPEN
            and not scope["path"].startswith(_PAGE_FILES)
        ):
            try:
                account = self._account(Headers(scope=scope).get("authorization", ""))
                scope["state"]["notes"]["key"] = account.name
                if scope["method"] == "POST":
                    account.admit()
            except RequestError as error:
                self._refused(scope["path"], error.status)
                await JSONResponse(error.body(), error.status, error.headers())(scope, receive, send)
                return
            scope["state"]["account"] = account
        await self._app(scope, receive, send)

    def _account(self, authorization: str) -> Account:
        kind, _, key = authorization.partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            message = "no API key: send the header 'Authorization: Bearer KEY'"
            raise RequestError(401, message, code="invalid_api_key")
        if (account := self._accounts.find(key.strip())) is None:
            raise RequestError(401, "this API key is not one of the endpoint's", code="invalid_api_key")
        return account


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
