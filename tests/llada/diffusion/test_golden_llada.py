"""LLaDA's forward process, losses and likelihood against numbers of the official code."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from llada.diffusion.cross_entropy import token_cross_entropy
from llada.diffusion.likelihood import answer_nats, stratified_counts
from llada.diffusion.objective import forward_process, masked_diffusion_loss
from llada.model.hf import load_model
from llada.model.transformer import Transformer


@cache
def load(folder: Path) -> Transformer:
    return load_model(folder)


def read_cases(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / name).read_text())["cases"]


@pytest.mark.parametrize("file", ["pretrain_loss.json", "sft_loss.json"])
def test_losses_equal_the_guideline(golden_dir: Path, file: str) -> None:
    cases = read_cases(golden_dir, file)
    assert len(cases) == (6 if file.startswith("pre") else 4)
    for case in cases:
        clean = torch.tensor(case["input_ids"])
        rows, length = clean.shape
        sft = "prompt_lengths" in case
        prompts = torch.tensor(case.get("prompt_lengths", [0] * rows))
        noisy = forward_process(
            clean,
            t=torch.tensor(case["t"]),
            schedule="llada",
            maskable=torch.arange(length) >= prompts[:, None] if sft else None,
            mask_id=case["mask_id"],
            uniform=torch.tensor(case["uniform"]),
        )
        name = case["name"]
        assert noisy.tokens.tolist() == case["noisy_ids"], name
        assert noisy.masked.long().tolist() == case["mask"], name
        torch.testing.assert_close(noisy.mask_prob, torch.tensor(case["p_mask"]))
        model = load(golden_dir / case["checkpoint"])
        with torch.no_grad():
            logits = model(noisy.tokens)
        per_token = token_cross_entropy(logits[noisy.masked], clean[noisy.masked])
        weights = noisy.weight[noisy.masked.nonzero()[:, 0]]
        expected = torch.tensor(case["token_loss"])
        torch.testing.assert_close(per_token * weights, expected, rtol=1e-4, atol=1e-4, msg=name)
        normalizer = rows * torch.tensor(case["answer_lengths"]) if sft else rows * length
        for form in (logits, logits[noisy.masked]):
            loss = masked_diffusion_loss(form, clean, noisy, normalizer=normalizer)
            assert loss.item() == pytest.approx(case["loss"], rel=1e-4, abs=1e-5), name


def test_answer_nats_equal_the_official_likelihood(golden_dir: Path) -> None:
    cases = read_cases(golden_dir, "likelihood.json")
    assert len(cases) == 8
    for case in cases:
        model = load(golden_dir / case["checkpoint"])
        clean = torch.tensor(case["prompt_ids"] + case["answer_ids"])
        answer = torch.arange(len(clean)) >= len(case["prompt_ids"])
        length, batch = len(case["answer_ids"]), case["batch_size"]
        for draw in case["draws"]:
            counts = stratified_counts(draw["mask_counts"][0], batch, length)
            assert counts.tolist() == draw["mask_counts"], case["name"]
        for result in case["results"]:
            losses = []
            for draw in case["draws"]:
                noisy = torch.tensor(draw["noisy_ids"])
                nats = answer_nats(
                    model,
                    noisy,
                    clean.expand_as(noisy),
                    answer.expand_as(noisy),
                    mask_id=case["mask_id"],
                    cfg_scale=result["cfg_scale"],
                )
                losses.append(nats.mean().item())
            assert losses == pytest.approx(result["batch_loss"], rel=1e-4, abs=1e-4), case["name"]
            assert -sum(losses) / len(losses) == pytest.approx(result["log_likelihood"], rel=1e-4, abs=1e-4)
