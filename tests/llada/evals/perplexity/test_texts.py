"""Perplexity of local texts: against exact enumeration and the plain bound, and independent of how the work is cut."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llada
from llada.diffusion.likelihood import answer_nats
from llada.errors import UserError
from llada.evals.evaluation import EvaluateConfig, Evaluation
from llada.evals.perplexity.corpora import TextsConfig
from llada.evals.perplexity.texts import measure_text_perplexity
from llada.tokenizer import encode_texts, save_tokenizer

EvaluationOf = Callable[[str, EvaluateConfig], Evaluation]
TEXT = "The cat sat on the mat. What is nothing? Ünderground.\n" * 5


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    (tmp_path / "notes.txt").write_text(TEXT)
    texts = TextsConfig((str(tmp_path / "notes.txt"),), block_length=16)
    return EvaluateConfig(("text_perplexity",), texts=texts, num_samples=3, rows_per_block=4, seed=5)


def test_figures_are_those_of_the_plain_bound(
    diffusion_model: str, config: EvaluateConfig, evaluation_of: EvaluationOf
) -> None:
    figures = measure_text_perplexity(evaluation_of(diffusion_model, config))
    model, tokenizer = llada.load(diffusion_model)
    assert tokenizer is not None
    ids = [*encode_texts(tokenizer, [TEXT])[0], tokenizer.eos_token_id]
    rest = len(ids) % 16
    assert rest
    rows = torch.zeros(len(ids) // 16 + 1, 16, dtype=torch.int64)
    rows.view(-1)[: len(ids)] = torch.tensor(ids)
    maskable = torch.arange(rows.numel()).view_as(rows) < len(ids)
    bound = llada.perplexity_bound(
        model,
        rows,
        maskable=maskable,
        segment_ids=(~maskable).long(),
        num_samples=3,
        seed=5,
    )
    assert figures["notes/nats_per_token"] == pytest.approx(bound.nats_per_token, rel=1e-5)
    assert figures["notes/standard_error"] == pytest.approx(bound.standard_error, rel=1e-4)
    assert figures["notes/perplexity_bound"] == pytest.approx(math.exp(bound.nats_per_token), rel=1e-4)
    error = math.exp(bound.nats_per_token) * bound.standard_error
    assert figures["notes/perplexity_bound_error"] == pytest.approx(error, rel=1e-3)
    assert (figures["notes/tokens"], figures["notes/tokens_left_out"]) == (len(ids), 0)
    total_bits = bound.nats_per_token * len(ids) / math.log(2)
    assert figures["notes/bits_per_character"] == pytest.approx(total_bits / len(TEXT), rel=1e-5)
    assert figures["notes/bits_per_byte"] == pytest.approx(total_bits / len(TEXT.encode()), rel=1e-5)
    assert figures["notes/bits_per_byte"] < figures["notes/bits_per_character"]


def test_of_the_blocks_that_are_scored_the_characters_are_counted(
    diffusion_model: str, config: EvaluateConfig, evaluation_of: EvaluationOf
) -> None:
    config = replace(config, texts=replace(config.texts, max_blocks=4))
    figures = measure_text_perplexity(evaluation_of(diffusion_model, config))
    _, tokenizer = llada.load(diffusion_model)
    assert tokenizer is not None
    characters = len(TEXT) * 64 / len(encode_texts(tokenizer, [TEXT])[0])
    assert (figures["notes/blocks"], figures["notes/characters"]) == (4, round(characters))
    bits = figures["notes/nats_per_token"] * 64 / math.log(2)
    assert figures["notes/bits_per_character"] == pytest.approx(bits / characters, rel=1e-6)


def test_how_the_work_is_cut_changes_nothing(
    diffusion_model: str, config: EvaluateConfig, evaluation_of: EvaluationOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure_text_perplexity(evaluation_of(diffusion_model, config))
    for rows, fed in ((1, 1), (1000, 100)):
        monkeypatch.setattr("llada.evals.perplexity.texts.FED_TOKENS", fed)
        cut = measure_text_perplexity(evaluation_of(diffusion_model, replace(config, rows_per_block=rows)))
        assert cut == pytest.approx(whole, rel=1e-5)
    other = measure_text_perplexity(evaluation_of(diffusion_model, replace(config, seed=6)))
    assert other["notes/nats_per_token"] != pytest.approx(whole["notes/nats_per_token"], rel=1e-5)


def test_blocks_of_another_text_are_other_blocks(
    diffusion_model: str, config: EvaluateConfig, evaluation_of: EvaluationOf
) -> None:
    """Results are kept by what a block holds: a text that is read otherwise is not taken for the one that was scored."""
    evaluation, asked = evaluation_of(diffusion_model, config), []

    def map_blocks(build: Any, blocks: Sequence[Any], *, folder: str) -> Iterator[Any]:
        asked.append(blocks)
        return evaluation.map_blocks(build, blocks, folder=folder)

    for text in (TEXT, TEXT, TEXT.replace("cat", "mat")):
        Path(config.texts.paths[0]).write_text(text)
        measure_text_perplexity(replace(evaluation, map_blocks=map_blocks))
    assert asked[0] == asked[1]
    assert len(asked[2]) == len(asked[0])
    assert not any(block in asked[0] for block in asked[2])


def test_it_is_the_bound_that_all_masks_give(
    tmp_path: Path, diffusion_model: str, config: EvaluateConfig, evaluation_of: EvaluationOf
) -> None:
    """Blocks of five tokens, of which every mask is enumerated."""
    texts = replace(config.texts, block_length=5, max_blocks=4, block_ends=True)
    config = replace(config, texts=texts, num_samples=600, rows_per_block=2)
    found = measure_text_perplexity(evaluation_of(diffusion_model, config))
    model, tokenizer = llada.load(diffusion_model)
    assert tokenizer is not None
    mask, ids = tokenizer.mask_token_id, encode_texts(tokenizer, [TEXT])[0]
    total = 0.0
    for at in range(0, 12, 3):
        row = torch.tensor([[tokenizer.bos_token_id, *ids[at : at + 3], tokenizer.eos_token_id]])
        for bits in itertools.product((False, True), repeat=5):
            if any(bits):
                noisy = torch.where(torch.tensor([bits]), mask, row)
                nats = answer_nats(model, noisy, row, torch.ones_like(row, dtype=torch.bool), mask_id=mask)
                # With the mask token's probability taken out of the network's.
                with torch.no_grad():
                    out = model(noisy)[noisy == mask].log_softmax(-1)[:, mask].exp()
                nats = nats + torch.log1p(-out).sum() * 5 / sum(bits)
                total += float(nats) / (5 * math.comb(5, sum(bits)))
    assert found["notes/tokens"] == 20
    assert found["notes/nats_per_token"] == pytest.approx(total / 20, rel=3e-3)


def test_an_autoregressive_twin_is_exact(
    causal_model: str, config: EvaluateConfig, evaluation_of: EvaluationOf
) -> None:
    config = replace(config, texts=replace(config.texts, keeps_rest=False, max_blocks=3))
    figures = measure_text_perplexity(evaluation_of(causal_model, config))
    model, tokenizer = llada.load(causal_model)
    assert tokenizer is not None
    rows = torch.tensor(encode_texts(tokenizer, [TEXT])[0][:48]).view(3, 16)
    log_p = model(rows)[:, :-1].log_softmax(-1).gather(2, rows[:, 1:, None]).detach()
    assert figures["notes/nats_per_token"] == pytest.approx(-float(log_p.mean()), rel=1e-5)
    assert figures["notes/perplexity"] == pytest.approx(math.exp(-float(log_p.mean())), rel=1e-5)
    assert "notes/perplexity_bound" not in figures
    assert figures["notes/tokens"] == 45
    assert figures["notes/tokens_left_out"] == 0  # the text ends where the last of these blocks does
    assert figures["notes/bits_per_character"] > figures["notes/bits_per_byte"] > 0
    # A last block of one token has nothing to be asked for.
    total = len(encode_texts(tokenizer, [TEXT])[0]) + 1
    length = next(n for n in range(2, 64) if total % n == 1)
    odd = replace(config, texts=TextsConfig(config.texts.paths, block_length=length))
    figures = measure_text_perplexity(evaluation_of(causal_model, odd))
    assert (figures["notes/tokens"], figures["notes/tokens_left_out"]) == (total - total // length - 1, 0)


def test_what_cannot_be_measured_is_one_line(
    tmp_path: Path,
    diffusion_model: str,
    save_checkpoint: Callable[..., str],
    config: EvaluateConfig,
    evaluation_of: EvaluationOf,
) -> None:
    def refused(match: str, model: str = diffusion_model, **texts: object) -> None:
        changed = replace(config, texts=replace(config.texts, **texts))
        with pytest.raises(UserError, match=match) as caught:
            measure_text_perplexity(evaluation_of(model, changed))
        assert "\n" not in str(caught.value)

    refused("needs --texts.paths", paths=())
    refused(r"block_length 65 is longer than the context of .*, 64", block_length=65)
    (tmp_path / "ptb.txt").write_text("too short\n")
    refused(
        r"ptb\.txt: \d+ tokens of text do not fill a block of 16: .*block-length",
        paths=(f"{tmp_path}/ptb.txt",),
    )
    bare = save_checkpoint(tmp_path / "bare")
    _, tokenizer = llada.load(bare)
    assert tokenizer is not None
    tokenizer.bos_token = None
    save_tokenizer(tokenizer, bare)
    refused("no token for the beginning of a text: --texts.block-ends False", bare, block_ends=True)
    Path(bare, "tokenizer.json").unlink()
    refused("has no tokenizer, which the task text_perplexity needs", bare)


def test_each_file_has_its_figures(
    tmp_path: Path, diffusion_model: str, config: EvaluateConfig, evaluation_of: EvaluationOf
) -> None:
    (tmp_path / "lambada.jsonl").write_text(json.dumps({"text": "“ It is what it is ” he said"}) + "\n")
    config = replace(config, texts=TextsConfig((str(tmp_path),), block_length=8))
    figures = measure_text_perplexity(evaluation_of(diffusion_model, config))
    assert {name.split("/")[0] for name in figures} == {"notes", "lambada"}
    # Blocks of the data set as it was published: ends, and the rest left out.
    assert figures["lambada/tokens"] % 8 == 0
    assert figures["lambada/published_perplexity_bound"] == 47.52
    assert "notes/published_perplexity_bound" not in figures
