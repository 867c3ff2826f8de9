"""One request of a dialect, from the first byte of its body to the last of its answer: its limits, its time, its end.

Whatever goes wrong before the first text is an HTTP status, later an event of the stream; and however it ends, also because the
client has left, the work for it ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from email.message import Message as MimeHeaders
from typing import Any, TypeVar, cast

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from llada.sampling.events import Started
from pipelines.serving.access_log import ids_of, notes
from pipelines.serving.backend import Backend
from pipelines.serving.dialects.body import SamplingBody
from pipelines.serving.dialects.calls import AnyBody, CallBody
from pipelines.serving.dialects.parsing import parse_body
from pipelines.serving.dialects.writer import ReplyWriter, to_json
from pipelines.serving.errors import RequestError, shorten
from pipelines.serving.events import HandedOn, Refused, ReplicaEvent, Restarted, Serving, Written
from pipelines.serving.limits import RequestLimits
from pipelines.serving.metrics import GatewayMetrics, RequestTrack

T = TypeVar("T")
_log = logging.getLogger(__name__)
# A client's own time limit, which Ray enforces with a plain text 408 (a value that is not positive: none).
_TIMEOUT_HEADER = "x-request-timeout-seconds"
# So long after the end of its time an answer may still be on its way.
_LAST_BYTES_S = 10.0
# A body of which nothing comes for so long is not waited for.
_BODY_PAUSE_S = 30.0
# Of all dialects, what a person wrote.
_PROMPT_FIELDS = {"prompt", "suffix", "messages", "input", "instructions", "tokens"}
# A body that is parsed in less time than it takes to give it to a thread.
_SHORT_BYTES = 1 << 14


@dataclass(frozen=True)
class Dialect:
    """A way to ask for text: where, with which body, and in which form the reply comes."""

    path: str
    body: type[SamplingBody] | type[CallBody]
    writer: Callable[[Any, str], Any]
    """A ReplyWriter, or, of what does not stream, a CallWriter."""


def check_model(name: str, models: Sequence[str]) -> None:
    if name not in models:
        served = " and ".join(map(repr, models))
        message = f"the model {shorten(name)!r} does not exist; this endpoint serves {served}"
        raise RequestError(404, message, param="model", code="model_not_found")


async def answer(
    dialect: Dialect,
    backend: Backend,
    metrics: GatewayMetrics,
    request: Request,
    models: Sequence[str],
    limits: RequestLimits,
    *,
    logs_prompt: bool,
) -> Response:
    """Run a request. Whatever goes wrong before its first text is an HTTP status, not a broken stream."""
    timer = _Timer(_seconds(request, limits))
    with contextlib.ExitStack() as stack:
        track = stack.enter_context(
            metrics.track(dialect.path, notes(request), request.scope["state"].get("account"))
        )
        try:
            _check_headers(request)
            raw = await timer.wait_for(_read_body(request, limits.body_bytes))
            kind = cast("type[SamplingBody]", dialect.body)
            body: AnyBody
            if len(raw) <= _SHORT_BYTES:
                body = parse_body(kind, raw)
            else:  # a large one must not hold up the streams of the others
                body = await asyncio.to_thread(parse_body, kind, raw)
            if body.model is not None:
                check_model(body.model, models)
            track.model = body.model or models[0]
            limits.check(body)
            track.wait()
            track.notes |= {"stream": body.stream, "choices": body.num_prompts * body.n}
            if logs_prompt:
                track.notes |= body.model_dump(include=_PROMPT_FIELDS, exclude_none=True)
            writer = dialect.writer(body, track.model)
            events = _follow(backend.stream(body, ids_of(request)), writer, track, timer)
            if not body.stream:
                await _while_waited_for(request, _collect(events, writer))
                content = await _write_whole(writer, body)
                track.status = 200
                return Response(content, headers=_fingerprint(writer), media_type="application/json")
            first = await _while_waited_for(request, _next(events))
        except RequestError as error:
            track.status = error.status
            raise
        except ClientDisconnect:
            return Response(status_code=track.status)
        except Exception as error:
            _log.exception("a request failed")
            track.status = 500
            raise RequestError(500, "the model failed on this request; the server's log says why") from error
        lasting = stack.pop_all()  # the stream ends it
    return _EventStream(_sse(first, events, writer, track), events, lasting, timer, _fingerprint(writer))


async def _write_whole(writer: ReplyWriter, body: AnyBody) -> bytes:
    """The JSON of an answer. One that tells of each token may have megabytes, which must not hold up the streams of the others."""
    if not body.tells_tokens:
        return to_json(writer.whole())
    return await asyncio.to_thread(lambda: to_json(writer.whole()))


def _fingerprint(writer: ReplyWriter) -> dict[str, str]:
    return {} if writer.system_fingerprint is None else {"system-fingerprint": writer.system_fingerprint}


def _check_headers(request: Request) -> None:
    """Raises RequestError 415 for a body that is declared to be something else than JSON in UTF-8."""
    declared = request.headers.get("content-type", "application/json")
    read = MimeHeaders()
    read["content-type"] = declared
    charset = read.get_content_charset("utf-8")
    if read.get_content_type() != "application/json" or charset not in ("utf-8", "utf8", "us-ascii"):
        raise RequestError(415, f"Content-Type {shorten(declared)!r} is not supported: send application/json")
    if (coding := request.headers.get("content-encoding", "identity")) != "identity":
        raise RequestError(415, f"Content-Encoding {shorten(coding)!r} is not supported: send the plain body")


async def _read_body(request: Request, limit: int) -> bytes:
    """Raises RequestError 413 as soon as it is known that there are more than `limit` bytes, 408 when they do not come, 400 when
    they are lost or cannot be read, and ClientDisconnect."""
    error = RequestError(413, f"the body has more than the {limit:,} bytes allowed", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise error
    parts, size = [], 0
    now = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(_BODY_PAUSE_S) as pause:
            async for part in request.stream():
                pause.reschedule(now() + _BODY_PAUSE_S)
                size += len(part)
                if size > limit:
                    break
                parts.append(part)
    except TimeoutError as stalled:
        message = f"nothing of the body has come for {_BODY_PAUSE_S:g} s"
        raise RequestError(408, message, code="timeout") from stalled
    except Exception as gone:
        if refusal := request.scope["state"].get("refusal"):  # our own HTTP server has told the client
            raise RequestError(*refusal) from gone
        # Ray's proxy passes the parts on, and breaks off as the client has: its own error may be here before the word of that.
        raise ClientDisconnect from gone
    if size > limit:
        raise error
    is_declared = length.strip("0") or "transfer-encoding" in request.headers
    if not size and is_declared and (offered := request.headers.get("upgrade")):
        # Ray's proxy takes the offer for accepted, and what follows for something else than the body.
        message = (
            "the body is lost, as a proxy before the endpoint took the offer in the header"
            f" 'Upgrade: {shorten(offered)}' for accepted: send plain HTTP/1.1, without that header"
        )
        raise RequestError(400, message)
    return b"".join(parts)


async def _collect(events: AsyncGenerator[Written, None], writer: ReplyWriter) -> None:
    async with contextlib.aclosing(events):
        async for event in events:
            writer.add(event)


async def _next(events: AsyncGenerator[Written, None]) -> Written:
    return await anext(events)


async def _while_waited_for(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of what makes an answer to a body that has been read. Raises ClientDisconnect, and ends the work, when the client
    leaves. (Ray's proxy cancels the whole request, an HTTP server of our own does not.)"""
    working = asyncio.create_task(work)
    listening = asyncio.ensure_future(request.receive())  # after the body nothing else comes
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done() and _has_left(listening):
            raise ClientDisconnect
        return await working
    finally:
        listening.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait({working})


def _has_left(listening: asyncio.Future[Message]) -> bool:
    return listening.exception() is not None or listening.result()["type"] == "http.disconnect"


def _seconds(request: Request, limits: RequestLimits) -> float:
    """How long the request may take: the limit, or less when its client says so."""
    try:
        asked = float(request.headers.get(_TIMEOUT_HEADER, ""))
    except ValueError:
        return limits.seconds
    if not (math.isfinite(asked) and asked > 0):
        return limits.seconds
    return min(limits.seconds, 0.9 * asked)  # before Ray cuts it off


class _Timer:
    """The time that a request has left. What takes longer is cancelled, and ends as RequestError 408."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.deadline = asyncio.get_running_loop().time() + seconds

    async def wait_for(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout_at(self.deadline) as timeout:
                return await work
        except TimeoutError as error:
            if not timeout.expired():
                raise
            message = f"the request took longer than the {self._seconds:g} s that it has"
            raise RequestError(408, message, code="timeout") from error


class _EventStream(StreamingResponse):
    """Server-sent events; however the answer ends, also before its first byte, the work and the count of it end too."""

    def __init__(
        self,
        frames: AsyncIterator[str],
        events: AsyncGenerator[Written, None],
        lasting: contextlib.ExitStack,
        timer: _Timer,
        headers: dict[str, str],
    ) -> None:
        # No proxy may collect the events: X-Accel-Buffering is nginx's name for that.
        headers = headers | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(frames, media_type="text/event-stream", headers=headers)
        self._events, self._lasting, self._timer = events, lasting, timer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._lasting:
            async with contextlib.aclosing(self._events):
                # A client that does not read what it has asked for must not hold its place for ever.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(self._timer.deadline + _LAST_BYTES_S):
                        await super().__call__(scope, receive, send)


async def _follow(
    replies: AsyncGenerator[ReplicaEvent, None], writer: ReplyWriter, track: RequestTrack, timer: _Timer
) -> AsyncGenerator[Written, None]:
    """The texts and ends of a request; counts them, and tells the writer who answers. Raises RequestError for a request
    that was refused or took too long."""
    async with contextlib.aclosing(replies) as events:
        while (event := await timer.wait_for(anext(events, None))) is not None:
            track.see(event)
            if isinstance(event, Refused):
                raise RequestError(
                    event.status,
                    event.message,
                    param=event.param,
                    code=event.code,
                    retry_after_s=event.retry_after_s,
                )
            if isinstance(event, Serving):
                writer.system_fingerprint, writer.run_id = event.fingerprint, event.run_id
            elif isinstance(event, Restarted):
                writer.restart()
            elif not isinstance(event, Started | HandedOn):
                yield event


async def _sse(
    first: Written, events: AsyncGenerator[Written, None], writer: ReplyWriter, track: RequestTrack
) -> AsyncIterator[str]:
    """Server-sent events. A failure in their middle is one more event with OpenAI's error object."""
    try:
        for chunk in writer.chunks(first):
            yield writer.frame(chunk)
        async for event in events:
            for chunk in writer.chunks(event):
                yield writer.frame(chunk)
        for chunk in writer.closing_chunks():
            yield writer.frame(chunk)
        track.status = 200
    except Exception as error:
        known = isinstance(error, RequestError)
        _log.log(logging.INFO if known else logging.ERROR, "a stream broke off", exc_info=not known)
        broken = error if isinstance(error, RequestError) else RequestError(500, "the model failed midway")
        track.status = broken.status
        yield writer.frame(broken.body())
    yield writer.end_of_stream
