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
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, TypedDict

import torch
from transformers import PreTrainedTokenizerFast

from llada.errors import UserError
from llada.evals.evaluation import B, Block, MapBlocks, OpenModel, R
from llada.evals.scoring import Pair, Score, ScoreConfig, score_pairs
from llada.model.hf import read_config
from llada.model.transformer import Transformer
from llada.sampling.completions import complete_texts
from llada.sampling.config import SamplingConfig
from llada.sampling.text import checkpoint_tokenizer, load
from llada.settings import from_dict, hint
from llada.tokenizer import encode_texts

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


class ScoreBlock(Block):
    """Pairs of token ids to score."""

    pairs: list[tuple[list[int], list[int]]]


class WriteBlock(Block):
    """Prompts to complete, by the same settings."""

    prompts: list[list[int]]
    seed: int
    """Of the first prompt."""
    sampling: dict[str, Any]
    stop: list[str]


class Written(TypedDict):
    """A text, and the forwards that it took."""

    text: str
    nfe: int


@dataclass(frozen=True)
class Setup:
    """What a process needs to work on blocks."""

    open_model: OpenModel
    score: ScoreConfig
    max_rows: int | None
    """Of a forward at the most; None: as many as `score.max_tokens` allows."""

    def build_scorer(self) -> Callable[[ScoreBlock], list[Score]]:
        """Open the checkpoint; what scores blocks."""
        return Worker(self).score

    def build_writer(self) -> Callable[[WriteBlock], list[Written]]:
        """Open the checkpoint; what completes blocks."""
        return Worker(self).write


class Worker:
    """A process' checkpoint."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._model, self._tokenizer = setup.open_model(fast=True)

    def score(self, block: ScoreBlock) -> list[Score]:
        """A score for each pair."""
        return score_pairs(self._model, [Pair(*pair) for pair in block["pairs"]], self._setup.score)

    def write(self, block: WriteBlock) -> list[Written]:
        """A text for each prompt."""
        assert self._tokenizer is not None  # HarnessModel has seen it
        max_tokens = self._setup.score.max_tokens
        written = complete_texts(
            self._model,
            self._tokenizer,
            block["prompts"],
            from_dict(SamplingConfig, block["sampling"]),
            stop=block["stop"],
            seed=block["seed"],
            max_rows=self._setup.max_rows or max_tokens,
            max_tokens=max_tokens,
        )
        return [{"text": line["text"], "nfe": line["nfe"]} for line in written]


def open_folder(
    folder: str, device: str | None, dtype: str | None, *, fast: bool
) -> tuple[Transformer, PreTrainedTokenizerFast | None]:
    """An `OpenModel` for a local folder, in the precision that is asked for or in the file's."""
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        _log.warning(
            "there is no device %s on this machine: working on the CPU", device
        )  # lm_eval names it unasked
        device = "cpu"
    return load(folder, device=device, dtype=dtype)


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
    ) -> None:
        """
        Args:
            folder: a local copy of the checkpoint, of which the configuration and the tokenizer are read.
            setup: what works on the requests.
            sampling: settings of SamplingConfig; those that a task asks for go before them.
            gen_length: goes before what a task asks for.
            map_blocks: how blocks of requests are run; None: in this process.

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
        self._folder, self._reads_specials, self._calls = folder, False, 0
        self.num_cut = 0
        """Requests that did not fit the context."""

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
        """The conversation as the tokenizer's template renders it; its special tokens count from now on."""
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

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        scores = self._score_all([(context, continuation) for _texts, context, continuation in requests])
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts behind an end of text, in nats: with "monte_carlo" the bound."""
        texts = [request.args[0] for request in requests]
        scores = self._score_all([([self.prefix_token_id], self.tok_encode(text)) for text in texts])
        for text, (log_p, _) in zip(texts, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), log_p)
        return [log_p for log_p, _ in scores]

    def _score_all(self, asked: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        pieces: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, (context, continuation) in enumerate(asked):
            windows = list(_windows(context, continuation, self.max_length))
            self._count_cut(len(context) + len(continuation) > self.max_length)
            pieces += windows
            owners += [number] * len(windows)
        blocks: list[ScoreBlock] = [
            {"name": f"{start:010d}", "pairs": pieces[start : start + _REQUESTS_PER_BLOCK]}
            for start in range(0, len(pieces), _REQUESTS_PER_BLOCK)
        ]
        found = [(0.0, True)] * len(asked)
        scores = (
            score
            for result in self._run(self._setup.build_scorer, lambda worker: worker.score, blocks)
            for score in result
        )
        for owner, (log_p, is_greedy) in zip(owners, scores, strict=True):
            found[owner] = (found[owner][0] + log_p, found[owner][1] and is_greedy)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The texts, each up to its first stop string."""
        blocks: list[WriteBlock] = []
        for number, request in enumerate(requests):
            prompt, wishes = request.args
            sampling, stop = self._wishes(wishes)
            room = self.max_length - sampling["gen_length"]
            if room < 1:
                raise UserError(
                    f"lm_eval: {sampling['gen_length']} tokens of an answer leave no room for a prompt in the context of "
                    f"{self.max_length}; give a smaller gen_length in --model_args"
                )
            ids = self.tok_encode(prompt) or [self.prefix_token_id]
            self._count_cut(len(ids) > room)
            last = blocks[-1] if blocks else None
            if (
                last
                and len(last["prompts"]) < _REQUESTS_PER_BLOCK
                and (last["sampling"], last["stop"]) == (sampling, stop)
            ):
                last["prompts"].append(ids[-room:])
                continue
            seed = self._setup.score.seed + number
            blocks.append(
                {
                    "name": f"{number:010d}",
                    "prompts": [ids[-room:]],
                    "seed": seed,
                    "sampling": sampling,
                    "stop": stop,
                }
            )
        texts = [
            written["text"]
            for result in self._run(self._setup.build_writer, lambda worker: worker.write, blocks)
            for written in result
        ]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _wishes(self, wishes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The sampling settings and stop strings of a request.

        Raises UserError for a wish that nothing here can grant.
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
        return self._map_blocks(build, blocks, folder=f"requests/{self._calls:04d}")

    def _count_cut(self, is_cut: bool) -> None:
        self.num_cut += is_cut
        if is_cut and self.num_cut == 1:
            _log.warning(
                "a request does not fit the model's context of %d tokens; its beginning is left out, or it is scored in pieces",
                self.max_length,
            )


def _rows(batch_size: int | str) -> int | None:
    """Raises UserError unless it is a number of rows or "auto"."""
    if str(batch_size).startswith("auto"):
        return None
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise UserError(f"lm_eval: --batch_size must be a number of rows or auto, not {batch_size!r}")
    return int(batch_size)


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
