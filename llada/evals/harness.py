"""EleutherAI's lm-evaluation-harness on masked-diffusion checkpoints: the model "llada" of `lm_eval`.

    python -m llada.evals.harness --model llada --model_args pretrained=FOLDER,num_samples=128 --tasks hellaswag --limit 100

takes all of lm_eval's own words. Its `--model_args` are `pretrained`, the folder, and the settings of `ScoreConfig` (how answers are
scored) and `SamplingConfig` (how text is written) by their names; `cfg_scale` is that of both. What a task asks for of its own
accord (`until`, `max_gen_toks`) is heeded, unless `gen_length` is given here.

A prompt that leaves its answer no room in the context loses its beginning, an answer longer than the context is scored in
pieces, each behind as much as fits; both are counted (`num_cut`, and a warning).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import Any, NotRequired

from llada.errors import UserError
from llada.evals.evaluation import B, MapBlocks, R
from llada.evals.scoring import ScoreConfig
from llada.evals.worker import Cost, ScoreBlock, Setup, Worker, WriteBlock, open_folder
from llada.files import join
from llada.model.hf import read_config
from llada.sampling.config import SamplingConfig
from llada.sampling.text import checkpoint_tokenizer
from llada.settings import from_dict, hint, shorten
from llada.tokenizer import encode_texts, unknown_token_id

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import simple_parse_args_string
except ImportError:
    raise UserError("lm_eval is not installed: pip install 'llada-pipelines[eval]'") from None

_log = logging.getLogger(__name__)
_REQUESTS_PER_BLOCK = 64
# Of a task that says nothing about it, as in lm_eval's own models.
_GEN_LENGTH = 256


class Record(Cost):
    """What is known of a request beside its answer."""

    is_cut: bool
    """Whether it did not fit the context."""
    reveal_step: NotRequired[list[int]]
    """Of a text: see `Written`."""


@register_model("llada")
class HarnessModel(TemplateLM):
    """A checkpoint as lm_eval sees one."""

    def __init__(
        self,
        folder: str,
        setup: Setup,
        *,
        sampling: Mapping[str, Any],
        gen_length: int | None = None,
        map_blocks: MapBlocks | None = None,
        name: str = "",
    ) -> None:
        """
        Args:
            folder: a local copy of the checkpoint, of which the configuration and the tokenizer are read.
            setup: what works on the requests.
            sampling: settings of SamplingConfig; those that a task asks for go before them.
            gen_length: goes before what a task asks for.
            map_blocks: how blocks of requests are run; None: in this process.
            name: of the folder of its blocks, below "requests".

        Raises UserError: no checkpoint, one without a tokenizer, a setting that is unknown or out of its limits.
        """
        super().__init__()
        from_dict(
            SamplingConfig, {**sampling, **({"gen_length": gen_length} if gen_length else {})}, "sampling."
        )
        self._sampling, self._gen_length, self._setup, self._map_blocks = (
            sampling,
            gen_length,
            setup,
            map_blocks,
        )
        config, _ = read_config(folder)
        tokenizer = checkpoint_tokenizer(folder, config)
        if tokenizer is None:
            raise UserError(f"{folder} has no tokenizer, which lm_eval needs")
        self.tokenizer, self.max_length = tokenizer, config.max_length
        self._worker: Worker | None = None
        self._folder, self._name, self._reads_specials, self._calls = folder, name, False, 0
        self.num_cut = 0
        """Requests that did not fit the context."""
        self.records: dict[tuple[str | None, int | None], list[Record]] = {}
        """{(task, number of a document): a record for each of its requests, in their order}."""
        self._scored: list[Record] = []

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> HarnessModel:
        """lm_eval's `--model_args` as a string."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> HarnessModel:
        """lm_eval's `--model_args`, and the options of its own that it gives to a model."""
        given = {
            **arg_dict,
            **{name: value for name, value in (additional_config or {}).items() if value is not None},
        }
        return cls.from_arguments(**given)

    @classmethod
    def from_arguments(
        cls,
        pretrained: str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> HarnessModel:
        """A model in this process.

        Args:
            pretrained: checkpoint folder.
            batch_size: rows of a forward at the most; "auto": as many as `max_tokens` allows.
            settings: those of ScoreConfig and SamplingConfig.

        Raises UserError: see above.
        """
        scoring, sampling = ({field.name for field in fields(kind)} for kind in (ScoreConfig, SamplingConfig))
        for name in settings:
            if name not in scoring | sampling:
                raise UserError(f"lm_eval: unknown model argument {name}; {hint(name, scoring | sampling)}")
        score = from_dict(
            ScoreConfig, {name: settings[name] for name in settings if name in scoring}, "score."
        )
        rows = _rows(batch_size if max_batch_size is None else max_batch_size)
        gen_length = settings.pop("gen_length", None)
        return cls(
            pretrained,
            Setup(partial(open_folder, pretrained, device, dtype), score, rows),
            sampling={name: settings[name] for name in settings if name in sampling},
            gen_length=gen_length,
        )

    @property
    def eot_token_id(self) -> int:
        """What stands before a text without a context."""
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Of the cache of requests."""
        return self._folder.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the tokenizer's template renders it; its special tokens count from now on.

        Raises UserError: a tokenizer without a template.
        """
        if not self.tokenizer.chat_template:
            raise UserError(f"{self._folder}: its tokenizer has no chat template: prompts must be plain text")
        self._reads_specials = True
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, without any that it does not spell."""
        if self._reads_specials:
            return list(self.tokenizer.encode(string, add_special_tokens=False))
        return list(encode_texts(self.tokenizer, [string])[0])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p of the continuation behind the context in nats, whether the network would write it itself) of each."""
        answers = super().loglikelihood(requests, disable_tqdm=True)
        self._keep_records(requests, self._scored)
        return list(answers)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """lm_eval's own; a continuation that has no token of its own behind this context is read by itself."""
        given, wanted = super()._encode_pair(context, continuation)
        return given, wanted or self.tok_encode(continuation)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        for texts, _context, continuation in requests:
            self._require_tokens(texts[1], continuation)
        scores = self._score_all([(context, continuation) for _texts, context, continuation in requests])
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts behind an end of text, in nats: with "monte_carlo" the bound."""
        texts = [request.args[0] for request in requests]
        encoded = [self.tok_encode(text) for text in texts]
        for text, ids in zip(texts, encoded, strict=True):
            self._require_tokens(text, ids)
        scores = self._score_all([([self.prefix_token_id], ids) for ids in encoded])
        self._keep_records(requests, self._scored)
        for text, (log_p, _) in zip(texts, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), log_p)
        return [log_p for log_p, _ in scores]

    def _require_tokens(self, text: str, ids: Sequence[int]) -> None:
        """Raise UserError where the tokenizer cannot spell what is to be scored."""
        unknown = unknown_token_id(self.tokenizer)
        if text.strip() and (not ids or unknown in ids):
            raise UserError(
                f"{self._folder}: its tokenizer has no tokens for {shorten(text)}, whose likelihood is asked for"
            )

    def _score_all(self, asked: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(log p, whether it is greedy) of each continuation behind its context; what they took is in `_scored`."""
        pieces: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, (context, continuation) in enumerate(asked):
            windows = list(_windows(context, continuation, self.max_length))
            pieces += windows
            owners += [number] * len(windows)
        # By their lengths, so that a forward holds little padding.
        order = sorted(range(len(pieces)), key=lambda n: (len(pieces[n][0]) + len(pieces[n][1]), n))
        blocks: list[ScoreBlock] = []
        for start in range(0, len(order), _REQUESTS_PER_BLOCK):
            pairs = [pieces[n] for n in order[start : start + _REQUESTS_PER_BLOCK]]
            blocks.append({"name": f"{start:010d}", "num_requests": len(pairs), "pairs": pairs})
        found = [(0.0, True)] * len(asked)
        self._scored = [
            {"nfe": 0, "seconds": 0.0, "is_cut": self._count_cut(len(c) + len(t) > self.max_length)}
            for c, t in asked
        ]
        scores = (
            score
            for result in self._run(self._setup.build_scorer, lambda worker: worker.score, blocks)
            for score in result
        )
        for place, score in zip(order, scores, strict=True):
            owner = owners[place]
            found[owner] = (found[owner][0] + score["log_p"], found[owner][1] and score["is_greedy"])
            self._scored[owner]["nfe"] += score["nfe"]
            self._scored[owner]["seconds"] += score["seconds"]
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The texts, each up to its first stop string."""
        prompts, is_cut, wishes = [], [], []
        for request in requests:
            prompt, wish = request.args
            sampling, stop = self.text_settings(wish)
            room = self.max_length - sampling["gen_length"]
            ids = self.tok_encode(prompt) or [self.prefix_token_id]
            prompts.append(ids[-room:])
            is_cut.append(self._count_cut(len(ids) > room))
            wishes.append((sampling, stop))
        order, blocks = _write_blocks(prompts, wishes, self._setup.score.seed)
        texts, records = [""] * len(requests), list[Record | None]([None] * len(requests))
        written = (
            line
            for result in self._run(self._setup.build_writer, lambda worker: worker.write, blocks)
            for line in result
        )
        for number, line in zip(order, written, strict=True):
            texts[number] = line["text"]
            records[number] = {
                "nfe": line["nfe"],
                "seconds": line["seconds"],
                "is_cut": is_cut[number],
                "reveal_step": line["reveal_step"],
            }
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        self._keep_records(requests, [record for record in records if record])
        return texts

    def _keep_records(self, requests: Sequence[Instance], records: Sequence[Record]) -> None:
        for request, record in zip(requests, records, strict=True):
            self.records.setdefault((request.task_name, request.doc_id), []).append(record)

    def text_settings(self, wishes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The sampling settings and stop strings of a request that asks for this.

        Raises UserError for a wish that nothing here can grant, and for an answer beside which no prompt fits the context.
        """
        wishes = dict(wishes)
        until = wishes.pop("until", None) or []
        lengths = [wishes.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
        length = next((value for value in lengths if value is not None), _GEN_LENGTH)
        sampled = wishes.pop("do_sample", False)
        warmth: dict[str, Any] = {
            name: wishes.pop(name) for name in ("temperature", "top_p", "top_k", "min_p") if name in wishes
        }
        own = {field.name for field in fields(SamplingConfig)}
        for name in wishes:
            if name not in own:
                raise UserError(
                    f"lm_eval: the task or --gen_kwargs asks for {name}={wishes[name]!r}, which this sampler has not; "
                    f"{hint(name, own)}"
                )
        sampling: dict[str, Any] = {
            **self._sampling,
            "gen_length": self._gen_length or length,
            **(warmth if sampled else {}),
            **wishes,
        }
        settings = asdict(from_dict(SamplingConfig, sampling, "sampling."))
        if settings["gen_length"] >= self.max_length:
            raise UserError(
                f"lm_eval: {settings['gen_length']} tokens of an answer leave no room for a prompt in the context of "
                f"{self.max_length}; give a smaller gen_length"
            )
        return settings, [until] if isinstance(until, str) else list(until)

    def _run(
        self,
        build: Callable[[], Callable[[B], R]],
        here: Callable[[Worker], Callable[[B], R]],
        blocks: Sequence[B],
    ) -> Iterator[R]:
        self._calls += 1
        if self._map_blocks is None:
            self._worker = self._worker or Worker(self._setup)
            return map(here(self._worker), blocks)
        return self._map_blocks(build, blocks, folder=join("requests", self._name, f"{self._calls:04d}"))

    def _count_cut(self, is_cut: bool) -> bool:
        self.num_cut += is_cut
        if is_cut and self.num_cut == 1:
            _log.warning(
                "a request does not fit the model's context of %d tokens; its beginning is left out, or it is scored in pieces",
                self.max_length,
            )
        return is_cut


def _rows(batch_size: int | str) -> int | None:
    """Raises UserError unless it is a number of rows or "auto"."""
    if str(batch_size).startswith("auto"):
        return None
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise UserError(f"lm_eval: --batch_size must be a number of rows or auto, not {batch_size!r}")
    return int(batch_size)


def _write_blocks(
    prompts: Sequence[list[int]], wishes: Sequence[tuple[dict[str, Any], list[str]]], seed: int
) -> tuple[list[int], list[WriteBlock]]:
    """The prompts in the order in which they stand in blocks, and the blocks: those of one wish together, by their lengths, so
    that what a block takes is about the same for each of its prompts. A prompt's seed follows from its number."""
    order = sorted(range(len(prompts)), key=lambda n: (wishes.index(wishes[n]), len(prompts[n]), n))
    blocks: list[WriteBlock] = []
    for place, number in enumerate(order):
        sampling, stop = wishes[number]
        if (
            not blocks
            or blocks[-1]["num_requests"] == _REQUESTS_PER_BLOCK
            or (blocks[-1]["sampling"], blocks[-1]["stop"]) != (sampling, stop)
        ):
            blocks.append(
                {
                    "name": f"{place:010d}",
                    "num_requests": 0,
                    "prompts": [],
                    "seeds": [],
                    "sampling": sampling,
                    "stop": stop,
                }
            )
        blocks[-1]["prompts"].append(prompts[number])
        blocks[-1]["seeds"].append(seed + number)
        blocks[-1]["num_requests"] += 1
    return order, blocks


def _windows(
    context: list[int], continuation: list[int], max_length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """The continuation in pieces that fit, each behind as much of what precedes it as fits beside it, at least a token."""
    before = list(context)
    for start in range(0, len(continuation), max_length - 1):
        piece = continuation[start : start + max_length - 1]
        yield before[max(0, len(before) - (max_length - len(piece))) :], piece
        before += piece


def main() -> None:
    """lm_eval's command line, which knows the model "llada"."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
