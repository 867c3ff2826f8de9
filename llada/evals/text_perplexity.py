"""Perplexity of texts as MDLM measures it zero-shot (arXiv 2406.07524, Table 3): any checkpoint on local files, each a data set.

Of a masked-diffusion network it is the bound of `diffusion.likelihood`, of an autoregressive one the exact number. The noise belongs
to the block of text: neither how many blocks a worker gets nor who runs them changes a figure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llada.diffusion.likelihood import bound_samples, summarise_bound
from llada.errors import UserError
from llada.evals.causal import next_token_nats
from llada.evals.corpora import Corpus, find_corpora, read_documents
from llada.evals.evaluation import Block, Evaluation, Figures, OpenModel
from llada.evals.perplexity import FED_TOKENS
from llada.evals.wrapping import Wrapped, wrap_documents
from llada.model.hf import read_config
from llada.model.predict import device_of, resolve_mask_id
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.text import checkpoint_tokenizer
from llada.tokenizer import encode_texts


class TextBlocks(Block):
    """Some blocks of a text."""

    blocks: list[list[int]]
    """Token ids."""
    first: int
    """The number of the first one, of `total`."""
    total: int


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

    def __call__(self, work: TextBlocks) -> TextScores:
        nats: list[Tensor] = []
        numbers = itertools.count(work["first"])
        for length, group in itertools.groupby(work["blocks"], key=len):
            rows = torch.tensor(list(group))
            ids = torch.tensor(list(itertools.islice(numbers, len(rows))))
            for some in torch.arange(len(rows)).split(max(1, FED_TOKENS // length)):
                nats.append(self._nats(rows[some].to(device_of(self.model)), ids[some], work["total"]))
        unscored = int(self.model.config.causal)
        return {
            "nats": torch.cat(nats, dim=1).tolist(),
            "tokens": [len(block) - unscored for block in work["blocks"]],
        }

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


def open_scorer(open_model: OpenModel, num_samples: int, seed: int) -> TextScorer:
    """The scorer of a process."""
    return TextScorer(open_model(fast=True)[0], num_samples, seed)


def measure_text_perplexity(evaluation: Evaluation) -> Figures:
    """{"NAME/nats_per_token": …, "NAME/standard_error", "NAME/perplexity_bound" (of an autoregressive network, whose number is exact,
    "NAME/perplexity"), "NAME/bits_per_character", "NAME/bits_per_byte", each with "…_error", "NAME/published_perplexity_bound" where
    there is one, and what was scored: "NAME/tokens", "NAME/tokens_left_out", "NAME/characters"}.

    Raises UserError: no files, a checkpoint without a tokenizer, a text shorter than a block.
    """
    config = evaluation.config.texts
    if not config.paths:
        raise UserError("the task text_perplexity needs --texts.paths, files or folders of texts")
    corpora = find_corpora(config.paths)
    folder = evaluation.fetch_model()
    network, _ = read_config(folder)
    tokenizer = checkpoint_tokenizer(folder, network)
    if tokenizer is None:
        raise UserError(f"{evaluation.model} has no tokenizer, which the task text_perplexity needs")
    build = partial(open_scorer, evaluation.open_model, evaluation.config.num_samples, evaluation.config.seed)
    figures: Figures = {}
    for corpus in corpora:
        wrapped = _wrap(evaluation, corpus, network, tokenizer)
        blocks = wrapped.blocks[: config.max_blocks]
        size = evaluation.config.rows_per_block
        work: list[TextBlocks] = [
            {"name": f"{at:010d}", "blocks": blocks[at : at + size], "first": at, "total": len(blocks)}
            for at in range(0, len(blocks), size)
        ]
        scores = list(evaluation.map_blocks(build, work, folder=f"texts/{corpus.name}"))
        found = _summarise(scores, wrapped, corpus, network.causal)
        figures |= {f"{corpus.name}/{name}": value for name, value in found.items()}
    return figures


def _wrap(
    evaluation: Evaluation, corpus: Corpus, network: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> Wrapped:
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
    texts = read_documents(corpus)
    try:
        return wrap_documents(
            texts,
            encode_texts(tokenizer, texts),
            length,
            eos_id=end if has_eos else None,
            ends=(begin, end) if has_ends else None,
            keeps_rest=choice(config.keeps_rest, data_set.keeps_rest),
        )
    except UserError as error:
        raise UserError(f"{corpus.url}: {error} (--texts.block-length)") from None


def _summarise(scores: Sequence[TextScores], wrapped: Wrapped, corpus: Corpus, is_exact: bool) -> Figures:
    samples = torch.cat([torch.tensor(part["nats"], dtype=torch.float64) for part in scores], dim=1)
    tokens = torch.tensor([count for part in scores for count in part["tokens"]])
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
    all_tokens = sum(map(len, wrapped.blocks))
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
