"""EleutherAI's lm-evaluation-harness on masked-diffusion checkpoints: the model "llada" of `lm_eval`.

    lm_eval --model llada --model_args pretrained=FOLDER,num_samples=128 --tasks hellaswag --limit 100

finds it by itself where this package is installed (plugin.py); `python -m llada.evals.harness` takes the same words, and tells of bad
input in one line. Its `--model_args` are `pretrained`, the folder, and the settings of `ScoreConfig` (how answers are
scored) and `SamplingConfig` (how text is written) by their names; `cfg_scale` is that of both. What a task asks for of its own
accord (`until`, `max_gen_toks`) is heeded, unless `gen_length` is given here.

A task's wish "gap" (llada/evals/requests/wishes.py) has the text fill what stands between a prompt and a suffix. A prompt that leaves
its answer no room in the context loses its beginning (a suffix its end), an answer longer than the context is scored in
pieces, each behind as much as fits; both are counted (`num_cut`, and a warning).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NotRequired

from llada.errors import UserError
from llada.evals.evaluation import B, MapBlocks, R
from llada.evals.requests.blocks import TextRequest, add_up, score_blocks, write_blocks
from llada.evals.requests.scoring import ScoreConfig
from llada.evals.requests.wishes import Writer
from llada.evals.requests.worker import Asked, Cost, Setup, Worker, open_folder
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
        score: ScoreConfig,
        sampling: Mapping[str, Any],
        gen_length: int | None = None,
        map_blocks: MapBlocks | None = None,
        name: str = "",
    ) -> None:
        """
        Args:
            folder: a local copy of the checkpoint, of which the configuration and the tokenizer are read.
            setup: what works on the requests.
            score: how continuations are scored; its seed is also that of texts.
            sampling: settings of SamplingConfig; those that a task asks for go before them.
            gen_length: goes before what a task asks for.
            map_blocks: how blocks of requests are run; None: in this process.
            name: of the folder of its blocks, below "requests".

        Raises UserError: no checkpoint, one without a tokenizer, a setting that is unknown, out of its limits, or not for an
            autoregressive one.
        """
        super().__init__()
        config, _ = read_config(folder)
        if config.causal and score.cfg_scale:
            raise UserError(
                f"{folder} is autoregressive: guidance (cfg_scale {score.cfg_scale}) compares with a masked prompt, which it does "
                "not know; leave it out, or take settings without"
            )
        self.writer = Writer(sampling, gen_length, config.max_length, config.causal)
        self._setup, self._score, self._map_blocks = setup, score, map_blocks
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
        self._documents: Sequence[object] = ()  # of the requests that are answered now

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
        pretrained: str | None = None,
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
        if pretrained is None:
            raise UserError("lm_eval: no checkpoint is named; give --model_args pretrained=FOLDER")
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
            Setup(partial(open_folder, pretrained, device, dtype), score.max_tokens, rows),
            score=score,
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

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's, which lm_eval's command line asks for before the first request; prompts that it has from its cache were
        rendered in an earlier run."""
        self._reads_specials = self._reads_specials or bool(chat_template)
        return super().chat_template(chat_template)

    def _look_for_chats(self, contexts: Iterable[str]) -> None:
        """Special tokens count, too, where all contexts begin with the one that the template begins with: from its cache of requests
        lm_eval takes them without asking for a template, where its command line is not used."""
        given = [context for context in contexts if context]
        if self._reads_specials or not given or not self.tokenizer.chat_template:
            return
        begin = self.tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        specials = sorted(self.tokenizer.all_special_tokens, key=len, reverse=True)
        first = next((token for token in specials if str(begin).startswith(token)), None)
        self._reads_specials = first is not None and all(context.startswith(first) for context in given)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, without any that it does not spell. Raises UserError for half of a surrogate pair in it, which JSON can
        spell."""
        try:
            string.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"half of a surrogate pair, which is no text, stands in {shorten(string)}"
            ) from None
        if self._reads_specials:
            return list(self.tokenizer.encode(string, add_special_tokens=False))
        return list(encode_texts(self.tokenizer, [string])[0])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p of the continuation behind the context in nats, whether the network would write it itself) of each.

        Raises UserError: no context and a continuation without tokens, and what `_require_tokens` raises.
        """
        self._look_for_chats(request.args[0] for request in requests)
        for request in requests:
            context, continuation = request.args[:2]
            if context:
                continue
            ids = self.tok_encode(continuation)
            self._require_tokens(continuation, ids)
            if not ids:
                raise UserError(
                    f"{request.task_name}, document {request.doc_id}: its context is empty, and its continuation has no tokens: "
                    "there is nothing to score"
                )
        self._documents = [(request.task_name, request.doc_id) for request in requests]
        answers = super().loglikelihood(requests, disable_tqdm=True)
        self._documents = ()
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
        asked: list[Asked] = []
        firsts: dict[Any, tuple[list[int], list[int]]] = {}
        documents = self._documents or range(len(requests))
        for document, (texts, context, continuation) in zip(documents, requests, strict=True):
            # Where a document's choices are contexts, they share the masks of the first: their difference has less noise. So do the
            # choices without a context beside those behind it (acc_mutual_info).
            first, its_continuation = firsts.setdefault(document, (context, continuation))
            shares = context != first and (continuation == its_continuation or not texts[0])
            asked.append((context, continuation, first if shares else None))
        scores = self._score_all(asked)
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts behind an end of text, in nats: with "monte_carlo" the bound."""
        texts = [request.args[0] for request in requests]
        encoded = [self.tok_encode(text) for text in texts]
        for text, ids in zip(texts, encoded, strict=True):
            self._require_tokens(text, ids)
        # Each text has masks of its own: else all of them would err the same way, having one context.
        scores = self._score_all([([self.prefix_token_id], ids, ids) for ids in encoded])
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

    def _score_all(self, asked: Sequence[Asked]) -> list[tuple[float, bool]]:
        """(log p, whether it is greedy) of each continuation behind its context; what they took is in `_scored`."""
        blocks, owners = score_blocks(asked, self._score, self.max_length)
        scores = (
            score
            for result in self._run(self._setup.build_scorer, lambda worker: worker.score, blocks)
            for score in result
        )
        found = add_up(len(asked), owners, scores)
        self._scored = [
            {
                "nfe": score["nfe"],
                "seconds": score["seconds"],
                "dtype": score["dtype"],
                "is_cut": self._count_cut(len(context) + len(continuation) > self.max_length),
            }
            for (context, continuation, _), score in zip(asked, found, strict=True)
        ]
        return [(score["log_p"], score["is_greedy"]) for score in found]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The texts, each up to its first stop string."""
        self._look_for_chats(request.args[0] for request in requests)
        asked, is_cut = [], []
        for request in requests:
            prompt, wishes = request.args
            suffix: list[int] = []
            masks, most = 0, self.max_length // 2  # of a gap; its prompt and suffix have the other half
            if gap := wishes.get("gap"):
                suffix = self.tok_encode(request.doc[gap["suffix"]])
                masks = len(self.tok_encode(request.doc[gap["answer"]]))
                wishes = {"max_gen_toks": max(1, min(masks, most)), **wishes}
            sampling, stop = self.writer.settings(wishes)
            room = self.max_length - sampling["gen_length"]
            ids = self.tok_encode(prompt) or [self.prefix_token_id]
            is_cut.append(
                self._count_cut(len(ids) + len(suffix) > room or masks > most == sampling["gen_length"])
            )
            # What is behind a gap keeps half of the room, and loses its end.
            suffix = suffix[: max(room // 2, room - len(ids))]
            asked.append(TextRequest(ids[len(suffix) - room :], sampling, stop, suffix))
        blocks, order = write_blocks(asked, self._score.seed)
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
                "dtype": line["dtype"],
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
