"""The task "generative_perplexity": how likely an autoregressive judge finds what the checkpoint writes from nothing, and, beside it,
how varied that is.

A low number alone means little: a text that repeats itself is likely, too, and whoever draws tokens in float32 lowers the temperature
without knowing (arXiv 2409.02908; the sampler here draws from probabilities in float64). So the entropy of each text's tokens
stands beside it, as in the code of the papers since (Duo, arXiv 2506.10892): −Σ p log p in nats over the shares p of the
token ids in a text, the mean over the texts.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from llada.diffusion.likelihood import summarise_bound
from llada.errors import UserError
from llada.evals.autoregressive.writing import (
    check_writing,
    never_written,
    start_of_text,
    write_left_to_right,
)
from llada.evals.evaluation import Block, EvaluateConfig, Evaluation, Figures, OpenModel
from llada.evals.perplexity.corpora import find_corpora, read_documents
from llada.evals.perplexity.judge import GenerativeConfig, encode_documents, judge_tokenizer, open_judge
from llada.files import absolute, join, write_bytes
from llada.model.hf import read_config
from llada.sampling.config import SamplingConfig
from llada.sampling.generate import generate
from llada.sampling.rules import temperature_of
from llada.sampling.text import checkpoint_tokenizer, end_ids, spell_fixed

_log = logging.getLogger(__name__)
GENERATED_FILE = "generated.jsonl"
_JUDGED_PER_BLOCK = 8


class Writing(Block):
    """Texts of these seeds, written together."""

    seeds: list[int]


class Judging(Block):
    """Texts as the judge's ids."""

    texts: list[list[int]]
    wants_features: bool


class Judged(TypedDict):
    """Of one text."""

    nats: float
    tokens: int
    features: list[float] | None


def needed_judge(config: EvaluateConfig) -> str:
    """Its folder. Raises UserError: none, settings that always write the same text."""
    judge = config.generative.judge
    if judge is None:
        raise UserError(
            "the task generative_perplexity needs --generative.judge, an autoregressive checkpoint's folder"
        )
    if temperature_of(config.sampling) == 0:
        raise UserError(
            "these settings write the same text each time: set --sampling.remasking ancestral, or a --sampling.temperature"
        )
    return judge


def measure_generative_perplexity(evaluation: Evaluation) -> Figures:
    """{"generative_perplexity", "generative_nats_per_token" and its "…_error", "sample_entropy" (nats) and its "…_error", "judged_tokens",
    and, with a reference, "mauve"}; each text is a line of generated.jsonl.

    Raises UserError: no judge, settings that always write the same text or that an autoregressive checkpoint cannot heed, one
    without a tokenizer.
    """
    config, sampling = evaluation.config.generative, evaluation.config.sampling
    judge_folder = needed_judge(evaluation.config)
    folder = evaluation.fetch_model()
    network, _ = read_config(folder)
    if network.causal:
        check_writing(sampling, evaluation.model)
    tokenizer = checkpoint_tokenizer(folder, network)
    if tokenizer is None:
        raise UserError(f"{evaluation.model} has no tokenizer, which the task generative_perplexity needs")
    judge = judge_tokenizer(evaluation.fetch_folder(absolute(judge_folder)))
    reference = _read_reference(config)

    seeds = [evaluation.config.seed * 1_000_003 + number for number in range(config.num_texts)]
    writing: list[Writing] = [
        {"name": f"{at:06d}", "seeds": seeds[at : at + config.texts_per_forward]}
        for at in range(0, len(seeds), config.texts_per_forward)
    ]
    build = partial(open_writer, evaluation.open_model, sampling)
    written = [ids for part in evaluation.map_blocks(build, writing, folder="written") for ids in part]
    texts = [split_documents(tokenizer, ids) for ids in written]
    wants_mauve = bool(reference) and _has_mauve()
    judged = _judge(evaluation, judge, texts, folder="judged", wants_features=wants_mauve)
    entropies = [token_entropy(ids) for ids in written]
    lines = [
        {
            "text": tokenizer.decode(ids),
            "entropy": entropy,
            "nats": each["nats"],
            "judged_tokens": each["tokens"],
        }
        for ids, entropy, each in zip(written, entropies, judged, strict=True)
    ]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_bytes(join(evaluation.output, GENERATED_FILE), content.encode())

    nats = torch.tensor([[each["nats"] for each in judged]], dtype=torch.float64)
    found = summarise_bound(nats, torch.tensor([each["tokens"] for each in judged]))
    figures: Figures = {
        "generative_perplexity": math.exp(found.nats_per_token),
        "generative_nats_per_token": found.nats_per_token,
        "generative_nats_per_token_error": found.standard_error,
        "sample_entropy": float(np.mean(entropies)),
        "sample_entropy_error": float(np.std(entropies, ddof=1)) / len(entropies) ** 0.5,
        "judged_tokens": sum(each["tokens"] for each in judged),
    }
    if wants_mauve:
        people = _judge(
            evaluation, judge, [[text] for text in reference], folder="judged_reference", wants_features=True
        )
        figures["mauve"] = mauve_score(people, judged)
    return figures


def open_writer(open_model: OpenModel, sampling: SamplingConfig) -> Callable[[Writing], list[list[int]]]:
    """What writes texts from nothing (an autoregressive network behind an end of text), as their `gen_length` token ids: no end
    ends them, as in MDLM's samples."""
    model, tokenizer = open_model(fast=True)
    assert tokenizer is not None  # measure_generative_perplexity has seen it
    if model.config.causal:
        start, never = start_of_text(tokenizer), never_written(tokenizer, sampling)
        return lambda block: write_left_to_right(
            model, [start] * len(block["seeds"]), sampling, never_ids=never, seed=block["seeds"]
        )
    knobs = asdict(spell_fixed(tokenizer, sampling))

    def write(block: Writing) -> list[list[int]]:
        found = generate(model, [[]] * len(block["seeds"]), seed=block["seeds"], **knobs)
        ids: list[list[int]] = found.sequences.tolist()
        return ids

    return write


def open_judging(
    fetch_folder: Callable[[str], str | Path], folder: str, context: int
) -> Callable[[Judging], list[Judged]]:
    """What judges texts in this process."""
    judge = open_judge(fetch_folder(folder), context)

    def judge_one(ids: list[int], wants_features: bool) -> Judged:
        nats, tokens = judge.verdict(ids)
        return {"nats": nats, "tokens": tokens, "features": judge.features(ids) if wants_features else None}

    return lambda block: [judge_one(ids, block["wants_features"]) for ids in block["texts"]]


def split_documents(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """What stands between the ends of text in a text's ids; other special tokens are left out."""
    ends = end_ids(tokenizer)
    documents: list[list[int]] = [[]]
    for token in ids:
        if token in ends:
            documents.append([])
        else:
            documents[-1].append(token)
    return [str(tokenizer.decode(document, skip_special_tokens=True)) for document in documents]


def token_entropy(ids: Sequence[int]) -> float:
    """−Σ p log p in nats, p the share of each id."""
    return -sum(count / len(ids) * math.log(count / len(ids)) for count in Counter(ids).values())


def _judge(
    evaluation: Evaluation,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[Sequence[str]],
    *,
    folder: str,
    wants_features: bool,
) -> list[Judged]:
    """The verdicts on texts, each of documents, by the judge with this tokenizer."""
    config = evaluation.config.generative
    assert config.judge is not None
    ids = [encode_documents(tokenizer, documents) for documents in texts]
    blocks: list[Judging] = [
        {"name": f"{at:06d}", "texts": ids[at : at + _JUDGED_PER_BLOCK], "wants_features": wants_features}
        for at in range(0, len(ids), _JUDGED_PER_BLOCK)
    ]
    build = partial(open_judging, evaluation.fetch_folder, absolute(config.judge), config.context)
    # Verdicts without features, of a run before mauve-text was installed, would not do.
    folder += "_with_features" if wants_features else ""
    return list(itertools.chain.from_iterable(evaluation.map_blocks(build, blocks, folder=folder)))


def _read_reference(config: GenerativeConfig) -> list[str]:
    if config.reference is None:
        return []
    documents = itertools.chain.from_iterable(map(read_documents, find_corpora([config.reference])))
    texts = list(itertools.islice((text for text in documents if text.strip()), config.num_texts))
    if len(texts) < 2:
        raise UserError(
            f"{config.reference} holds {len(texts)} texts, of which MAUVE needs many: give JSON lines"
        )
    return texts


def _has_mauve() -> bool:
    if importlib.util.find_spec("mauve") is not None:
        return True
    _log.warning("MAUVE is left out, because mauve-text is not installed: pip install mauve-text")
    return False


def mauve_score(people: Sequence[Judged], written: Sequence[Judged]) -> float:
    """MAUVE (arXiv 2102.01454) of two sets of texts by their features: 1 where they are alike, near 0 where nothing is."""
    import mauve

    def features(texts: Sequence[Judged]) -> np.ndarray:
        return np.array([text["features"] for text in texts], dtype=np.float32)

    result: Any = mauve.compute_mauve(
        p_features=features(people), q_features=features(written), verbose=False
    )
    return float(result.mauve)
