"""Perplexity of texts as MDLM measures it zero-shot (arXiv 2406.07524, Table 3): any checkpoint on local files, each a data set.

Of a masked-diffusion network it is the bound of `diffusion.likelihood`, of an autoregressive one the exact number. The noise belongs
to the block of text: neither how many blocks a worker gets nor who runs them changes a figure.

A text of any size is read once, document by document, into a file of its blocks' tokens, texts/NAME/tokens.bin, uint32, of which a
worker reads its part.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llada.diffusion.likelihood import bound_samples, summarise_bound
from llada.errors import UserError
from llada.evals.autoregressive.likelihood import next_token_nats
from llada.evals.evaluation import Block, EvaluateConfig, Evaluation, Figures, OpenModel
from llada.evals.perplexity.corpora import Corpus, find_corpora, read_documents
from llada.evals.perplexity.shards import FED_TOKENS
from llada.evals.perplexity.wrapping import Wrapped, Wrapping
from llada.files import fetch_ranges, join, writing
from llada.model.hf import read_config
from llada.model.predict import device_of, resolve_mask_id
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.text import checkpoint_tokenizer
from llada.tokenizer import encode_texts

TOKENS_FILE = "tokens.bin"
_DOCUMENTS_TOGETHER = 256


class TextBlocks(Block):
    """Some blocks of a text."""

    first: int
    count: int
    """They are the blocks first … first + count - 1."""
    total: int
    """Blocks of the text that are scored."""
    tokens: str
    """SHA-256 of the file of tokens."""


class TextScores(TypedDict):
    """What becomes of n blocks of text, as JSON."""

    nats: list[list[float]]
    """(num_samples, n) of a bound, (1, n) of exact likelihoods: summed over a block's tokens."""
    tokens: list[int]
    """(n,): tokens that were scored."""


@dataclass(frozen=True)
class TextScorer:
    """Scores blocks of text by one checkpoint, opened by `open_scorer`."""

    model: Transformer
    num_samples: int
    seed: int
    url: str
    """Of the file of tokens."""
    block_length: int

    def __call__(self, work: TextBlocks) -> TextScores:
        nats: list[Tensor] = []
        numbers, blocks = itertools.count(work["first"]), self._read(work)
        for length, group in itertools.groupby(blocks, key=len):
            rows = torch.tensor(list(group))
            ids = torch.tensor(list(itertools.islice(numbers, len(rows))))
            for some in torch.arange(len(rows)).split(max(1, FED_TOKENS // length)):
                nats.append(self._nats(rows[some].to(device_of(self.model)), ids[some], work["total"]))
        unscored = int(self.model.config.causal)
        return {
            "nats": torch.cat(nats, dim=1).tolist(),
            "tokens": [len(block) - unscored for block in blocks],
        }

    def _read(self, work: TextBlocks) -> list[list[int]]:
        begin, size = work["first"] * self.block_length, work["count"] * self.block_length
        (content,) = fetch_ranges([(self.url, 4 * begin, 4 * (begin + size))])
        tokens = np.frombuffer(content, dtype="<u4").tolist()
        return [tokens[at : at + self.block_length] for at in range(0, len(tokens), self.block_length)]

    def _nats(self, tokens: Tensor, ids: Tensor, total: int) -> Tensor:
        """(S, B) float64."""
        scored = torch.ones_like(tokens, dtype=torch.bool)
        if self.model.config.causal:
            scored[:, 0] = False
            return next_token_nats(self.model, tokens, scored).sum(1)[None]
        return bound_samples(
            self.model,
            tokens,
            scored,
            ids.to(tokens.device),
            num_rows=total,
            num_samples=self.num_samples,
            mask_id=resolve_mask_id(self.model, None),
            seed=self.seed,
        )


def open_scorer(
    open_model: OpenModel, num_samples: int, seed: int, url: str, block_length: int
) -> TextScorer:
    """The scorer of a process."""
    return TextScorer(open_model(fast=True)[0], num_samples, seed, url, block_length)


def needed_corpora(config: EvaluateConfig) -> list[Corpus]:
    """Raises UserError where none is given, or it is not there."""
    if not config.texts.paths:
        raise UserError("the task text_perplexity needs --texts.paths, files or folders of texts")
    return find_corpora(config.texts.paths)


def measure_text_perplexity(evaluation: Evaluation) -> Figures:
    """{"NAME/nats_per_token": …, "NAME/standard_error", "NAME/perplexity_bound" (of an autoregressive network, whose number is exact,
    "NAME/perplexity"), "NAME/bits_per_character", "NAME/bits_per_byte", each with "…_error", "NAME/published_perplexity_bound" where
    there is one, and what was scored: "NAME/tokens", "NAME/tokens_left_out", "NAME/characters"}.

    Raises UserError: no files, a checkpoint without a tokenizer, a text shorter than a block.
    """
    whole = evaluation.config
    corpora = needed_corpora(whole)
    folder = evaluation.fetch_model()
    network, _ = read_config(folder)
    tokenizer = checkpoint_tokenizer(folder, network)
    if tokenizer is None:
        raise UserError(f"{evaluation.model} has no tokenizer, which the task text_perplexity needs")
    figures: Figures = {}
    for corpus in corpora:
        folder = f"texts/{corpus.name}"
        url = join(evaluation.output, folder, TOKENS_FILE)
        wrapping = _wrapping(evaluation, corpus, network, tokenizer)
        wrapped, digest = _write_tokens(corpus, tokenizer, wrapping, url)
        total = wrapped.blocks
        work: list[TextBlocks] = [
            {
                "name": f"{at:010d}",
                "first": at,
                "count": min(whole.rows_per_block, total - at),
                "total": total,
                "tokens": digest,
            }
            for at in range(0, total, whole.rows_per_block)
        ]
        build = partial(
            open_scorer, evaluation.open_model, whole.num_samples, whole.seed, url, wrapping.block_length
        )
        nats, tokens = [], []
        for part in evaluation.map_blocks(build, work, folder=folder):
            nats.append(torch.tensor(part["nats"], dtype=torch.float64))
            tokens.append(torch.tensor(part["tokens"]))
        found = _summarise(torch.cat(nats, dim=1), torch.cat(tokens), wrapped, corpus, network.causal)
        figures |= {f"{corpus.name}/{name}": value for name, value in found.items()}
    return figures


def _wrapping(
    evaluation: Evaluation, corpus: Corpus, network: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> Wrapping:
    config, data_set = evaluation.config.texts, corpus.data_set

    def choice(asked: bool | None, usual: bool) -> bool:
        return usual if asked is None else asked

    length = config.block_length or network.max_length
    if length > network.max_length:
        raise UserError(
            f"texts.block_length {length} is longer than the context of {evaluation.model}, {network.max_length}"
        )
    # BERT's go by other names.
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    has_ends = choice(config.block_ends, data_set.block_ends)
    has_eos = choice(config.eos_between, data_set.eos_between)
    for needed, token, word, option in (
        (has_ends, begin, "beginning", "--texts.block-ends False"),
        (has_ends or has_eos, end, "end", "--texts.block-ends False --texts.eos-between False"),
    ):
        if needed and token is None:
            raise UserError(
                f"{evaluation.model}: the tokenizer has no token for the {word} of a text: {option}"
            )
    with _named(corpus):
        return Wrapping(
            length,
            eos_id=end if has_eos else None,
            ends=(begin, end) if has_ends else None,
            keeps_rest=choice(config.keeps_rest, data_set.keeps_rest),
            max_blocks=config.max_blocks,
        )


def _write_tokens(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, wrapping: Wrapping, url: str
) -> tuple[Wrapped, str]:
    """The text's blocks, one behind the other, as the file of tokens; what they hold, and the file's SHA-256."""
    texts, digest = read_documents(corpus), hashlib.sha256()
    with writing(url) as path, open(path, "wb") as stream:

        def write(blocks: Iterable[Sequence[int]]) -> None:
            for block in blocks:
                content = np.array(block, dtype="<u4").tobytes()
                digest.update(content)
                stream.write(content)

        while not wrapping.is_full and (some := list(itertools.islice(texts, _DOCUMENTS_TOGETHER))):
            for text, ids in zip(some, encode_texts(tokenizer, some), strict=True):
                write(wrapping.add(text, ids))
        with _named(corpus):
            last, wrapped = wrapping.finish()
        write(last)
    return wrapped, digest.hexdigest()


@contextlib.contextmanager
def _named(corpus: Corpus) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{corpus.url}: {error} (--texts.block-length)") from None


def _summarise(samples: Tensor, tokens: Tensor, wrapped: Wrapped, corpus: Corpus, is_exact: bool) -> Figures:
    """Of samples (S, n) float64 in nats, and tokens (n,), of n blocks."""
    bound = summarise_bound(samples, tokens)
    name, perplexity = "perplexity" if is_exact else "perplexity_bound", math.exp(bound.nats_per_token)
    figures: Figures = {
        "nats_per_token": bound.nats_per_token,
        "standard_error": bound.standard_error,
        name: perplexity,
        f"{name}_error": perplexity * bound.standard_error,
    }
    if (published := corpus.data_set.published) is not None:
        figures[f"published_{name}"] = published.autoregressive if is_exact else published.mdlm
    all_tokens = wrapped.block_tokens
    for name, units in (("character", wrapped.characters), ("byte", wrapped.num_bytes)):
        # A token has so many units of text, the ends of blocks none; one that an autoregressive network is not asked for, the
        # first of a block, counts as the others.
        bits = all_tokens / units / math.log(2)
        figures[f"bits_per_{name}"] = bound.nats_per_token * bits
        figures[f"bits_per_{name}_error"] = bound.standard_error * bits
    figures |= {
        "blocks": len(tokens),
        "tokens": int(tokens.sum()),
        "tokens_left_out": wrapped.tokens_left_out,
        "characters": round(wrapped.characters),
    }
    # Of a single block with a single sample there is no error.
    return {name: value for name, value in figures.items() if not math.isnan(value)}
