"""One copy of the model behind the endpoint: a request body in, events of its replies out.

It knows the tokenizer, the context length and the default sampling; Ray Serve runs it (pipelines/serve.py), and
without Ray it is an ordinary object.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence

import torch

import llada
from llada.errors import UserError
from llada.sampling.config import SamplingConfig
from llada.sampling.engine import DenoiseEngine
from llada.sampling.events import Event, Finished, Started, Text
from llada.sampling.request import GenerateRequest
from llada.sampling.stats import EngineStats
from pipelines.serving.access_log import RequestIds
from pipelines.serving.checkpoint import fingerprint, naming, verify_checkpoint
from pipelines.serving.collector import freeze_loaded
from pipelines.serving.dialects.body import Prompt, SamplingBody
from pipelines.serving.dialects.calls import AnyBody, CallBody
from pipelines.serving.dialects.completions import CompletionBody
from pipelines.serving.errors import RequestError
from pipelines.serving.events import Answer, Refused, ReplicaEvent, Serving
from pipelines.serving.prompts import PromptEncoder
from pipelines.serving.reports import report_to_gateway
from pipelines.serving.request_reader import RequestReader, blamed_knob
from pipelines.serving.scaling import MEAN_REQUEST, REPLIES, USUAL_REQUEST, WORK
from pipelines.serving.scoring import Score, score_prompts
from pipelines.stage.artifact import fetch_folder, find_manifest

_log = logging.getLogger(__name__)
# A stream's text comes no sooner after other text: a screen shows no more pictures, and each message costs its way through Ray.
_STREAM_PACE_S = 0.02
_WHOLE_PACE_S = 1.0
_NEWEST = 0.1  # the newest request's weight in the mean of them


class Denoiser:
    """The model at `model_url`, loaded once, and the engine that runs it."""

    def __init__(
        self,
        model_url: str,
        sampling: SamplingConfig,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        max_concurrent: int = 8,
        max_prompt_tokens: int | None = None,
        stall_timeout_s: float = 600.0,
        verify_checksums: bool = True,
        batch_invariant: bool = False,
        compiled: bool = False,
        version: str = "",
        is_alone: bool = True,
    ) -> None:
        """
        Args:
            sampling: what a request gets that does not say otherwise; `gen_length` is less where the context ends.
            dtype: of the weights, e.g. "bfloat16"; None keeps the file's.
            max_prompt_tokens: of a prompt with its suffix; None: what the context holds.
            stall_timeout_s: a forward that takes longer makes the health check fail.
            verify_checksums: read all weights before they are loaded, and refuse those that are not the manifest's.
            batch_invariant: rounding does not depend on what else runs (llada/sampling/forward.py).
            compiled: a forward has fewer kernels, and starting takes up to a minute more (llada/sampling/compiled.py).
            version: of the model, for metrics.
            is_alone: the replica is this model's for as long as it lives. Else somebody else looks after Python's collector and
                tells the gateway what is done.

        Raises:
            UserError: no model there, or one that cannot be served.
        """
        with naming(model_url):
            folder = fetch_folder(model_url)
            _check_device(device)
            contents = verify_checkpoint(folder, read_weights=verify_checksums)
            manifest = find_manifest(str(folder))
            model, tokenizer = llada.load(folder, device=device, dtype=dtype)
            if tokenizer is None:
                raise UserError("it has no tokenizer.json")
        self.run_id = manifest.get("mlflow_run_id") if manifest else None
        self.fingerprint = fingerprint(
            contents,
            device=device.partition(":")[0],
            dtype=str(next(model.parameters()).dtype),
            sampling=dataclasses.asdict(sampling),
            batch_invariant=batch_invariant,
            compiled=compiled,
            torch=torch.__version__,
        )
        self.sampling, self.stall_timeout_s = sampling, stall_timeout_s
        self._mean_request: float | None = None
        self.version = version
        self.engine = DenoiseEngine(
            model,
            tokenizer,
            max_concurrent=max_concurrent,
            batch_invariant=batch_invariant,
            compiled=compiled,
        )
        self.encoder = PromptEncoder(
            tokenizer,
            vocab_size=model.config.vocab_size,
            mask_id=self.engine.mask_id,
            max_length=model.config.max_length,
            max_prompt_tokens=max_prompt_tokens,
        )
        self.reader = RequestReader(
            self.engine,
            self.encoder,
            sampling,
            vocab_size=model.config.vocab_size,
            max_prompt_tokens=max_prompt_tokens,
        )
        self._is_alone = is_alone
        if is_alone:
            freeze_loaded()
            report_to_gateway(self)

    def stats(self) -> EngineStats:
        """What has been done, and what is to do."""
        return self.engine.stats()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray Serve asks for the autoscaling (scaling.py)."""
        stats, usual = self.engine.stats(), self._usual_request()
        return {
            REPLIES: float(stats.replies),
            WORK: float(stats.work_left),
            MEAN_REQUEST: usual if self._mean_request is None else self._mean_request,
            USUAL_REQUEST: usual,
        }

    def _usual_request(self) -> float:
        """Token-forwards of a reply by the defaults, to a prompt that is as long as it."""
        return self.engine.forecast.expect(self.sampling, self.sampling.gen_length)

    def _note_work(self, requests: Sequence[GenerateRequest], scores: Sequence[Score]) -> None:
        """Let what a request asks for count in the mean of those that have come of late."""
        if not requests and not scores:
            return
        expect = self.engine.forecast.expect
        work = sum(expect(one.sampling, len(one.prompt) + len(one.suffix)) for one in requests)
        work += sum(score.work(expect) for score in scores)
        before = self._usual_request() if self._mean_request is None else self._mean_request
        self._mean_request = before + _NEWEST * (work - before)

    async def canary(self) -> None:
        """Denoise one token. Raises what makes that fail."""
        _, requests = self.reader.requests_of(CompletionBody.model_validate({"prompt": "", "max_tokens": 1}))
        async for _ in self.engine.stream(
            *(dataclasses.replace(request, priority=1) for request in requests)
        ):
            pass

    def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        self.engine.check(stall_timeout_s=self.stall_timeout_s)

    def close(self) -> None:
        self.engine.close()
        if self._is_alone:
            gc.unfreeze()

    def __del__(self) -> None:
        if hasattr(self, "_is_alone"):
            self.close()

    async def stream(
        self, body: AnyBody, ids: RequestIds | None = None
    ) -> AsyncGenerator[ReplicaEvent, None]:
        """The events of `batches`, one after the other."""
        async with contextlib.aclosing(self.batches(body, ids)) as batches:
            async for events in batches:
                for event in events:
                    yield event

    async def batches(
        self, body: AnyBody, ids: RequestIds | None = None
    ) -> AsyncGenerator[list[ReplicaEvent], None]:
        """`Serving` and the events of all choices, or an `Answer`, or one `Refused`; what there is to say at a time, normally
        that of a forward, is one list, as each costs its way through Ray. Choice i answers prompt i // n. Leaving early
        cancels them. `ids`: for the log."""
        try:
            if isinstance(body, CallBody):
                answer = await asyncio.to_thread(body.answer, self.encoder)
                yield [Serving(self.fingerprint, self.run_id), Answer(answer)]
                return
            # In a thread: tokenising a long text must not hold up the streams of the others.
            prompts, requests = await asyncio.to_thread(self.reader.requests_of, body)
            scores = self._scores_of(body, prompts)
        except RequestError as error:
            yield [Refused(error.status, error.message, error.param, error.code)]
            return
        self._note_work(requests, scores)
        # Goes with what comes first.
        head: list[ReplicaEvent] = [Serving(self.fingerprint, self.run_id, self.version)]
        try:
            async with contextlib.aclosing(self._run(body, prompts, scores, requests)) as batches:
                async for events in batches:
                    yield [*head, *events]
                    head = []
        except UserError as error:
            yield [*head, Refused(400, str(error), blamed_knob(body, error), None)]
        except Exception as error:
            if head:
                yield head
            if ids is not None:  # the engine, which has logged what it is, does not know whose request it was
                _log.error(
                    "request %s (trace %s) has failed: %s", ids.request_id, ids.trace_id or "none", error
                )
            raise

    async def _run(
        self,
        body: SamplingBody,
        prompts: Sequence[Prompt],
        scores: Sequence[Score],
        requests: Sequence[GenerateRequest],
    ) -> AsyncGenerator[list[Event], None]:
        """The likelihoods that are asked for, then the replies, each behind its echo."""
        async with contextlib.aclosing(score_prompts(self.engine, scores)) as begun:
            async for started in begun:
                yield [started]
        ids = range(len(prompts) * body.n)
        if body.token_limit == 0:  # the prompts alone
            yield [
                told
                for event in _without_replies([prompts[i // body.n] for i in ids])
                for told in self._tell(event, body, prompts, scores)
            ]
            return
        # Of a whole reply the gateway hears now and then, too: what there is when a client leaves is charged, and it shows life.
        pace_s = _STREAM_PACE_S if body.stream else _WHOLE_PACE_S
        written = _Written(tells_tokens=body.tells_tokens) if body.json_schema is not None else None
        async with contextlib.aclosing(self.engine.batches(*requests, pace_s=pace_s)) as batches:
            async for events in batches:
                seen = events if written is None else map(written.see, events)
                yield [told for event in seen for told in self._tell(event, body, prompts, scores)]

    def _tell(
        self, event: Event, body: SamplingBody, prompts: Sequence[Prompt], scores: Sequence[Score]
    ) -> Iterator[Event]:
        """What an event of the engine is to the client."""
        prompt, choice = divmod(event.index, body.n)
        if isinstance(event, Started) and choice:
            event = dataclasses.replace(event, prompt_tokens=0)
        if isinstance(event, Finished):
            # The choices of one prompt share it: it counts once.
            given = 0 if choice else event.prompt_tokens
            spent = scores[prompt].forwards if scores and not choice else 0
            event = dataclasses.replace(event, prompt_tokens=given, nfe=event.nfe + spent)
        yield event
        if isinstance(event, Started) and (echo := prompts[prompt].echo) is not None:
            yield Text(event.index, echo, tuple(scores[prompt].tokens) if scores else ())

    def _scores_of(self, body: SamplingBody, prompts: Sequence[Prompt]) -> list[Score]:
        """The likelihoods that are asked for. Raises RequestError."""
        if (wanted := body.likelihood) is None:
            return []
        own = {"num_top": body.num_top or 0, "seed": body.seed or 0}
        cfg_scale = body.knobs().get("cfg_scale", self.sampling.cfg_scale)
        return [
            Score(self.engine, prompt.ids, **wanted._asdict(), **own, cfg_scale=cfg_scale)
            for prompt in prompts
        ]


class _Written:
    """Of replies in a frame, which are complete at their ends: tokens that only fill its places up are none of the reply's."""

    def __init__(self, *, tells_tokens: bool) -> None:
        self._tells_tokens, self._counts = tells_tokens, Counter[int]()

    def see(self, event: Event) -> Event:
        if isinstance(event, Text):
            self._counts[event.index] += sum(not token.is_special for token in event.tokens)
            tokens = event.tokens if self._tells_tokens else ()
            return dataclasses.replace(event, tokens=tokens, completion_tokens=self._counts[event.index])
        if isinstance(event, Finished):
            return dataclasses.replace(event, reason="stop", completion_tokens=self._counts[event.index])
        return event


def _without_replies(prompts: Sequence[Prompt]) -> Iterator[Event]:
    for index, prompt in enumerate(prompts):
        yield Started(index)
        yield Finished(index, "length", len(prompt.ids) + len(prompt.suffix), 0, 0)


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    # No such kind of device, none here, or a torch without its support.
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {name!r} here ({str(error).splitlines()[0]})") from None
