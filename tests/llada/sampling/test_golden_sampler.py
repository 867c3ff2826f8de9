"""Generation against the official sampler and against Fast-dLLM's threshold decoding: the same tokens, step by step."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from llada.model.hf import load_model
from llada.model.transformer import Transformer
from llada.sampling.generate import generate


@cache
def load(folder: Path) -> Transformer:
    return load_model(folder)


def test_generate_equals_the_official_sampler(golden_dir: Path) -> None:
    cases = json.loads((golden_dir / "generate.json").read_text())["cases"]
    assert len(cases) == 32
    for case in cases:
        model = load(golden_dir / case["checkpoint"])
        mask = torch.tensor(case["attention_mask"])
        knobs = {name: case[name] for name in ("gen_length", "steps", "block_length", "cfg_scale", "mask_id")}
        for attention_mask in [mask] if not mask.all() else [mask, None]:
            out = generate(model, torch.tensor(case["prompt_ids"]), attention_mask=attention_mask, **knobs)
            assert out.sequences.tolist() == case["output_ids"], case["name"]
            assert out.reveal_step.tolist() == case["commit_step"], case["name"]
            assert out.nfe == case["forwards"], case["name"]
        if mask.all():
            continue  # the left-padded cases once more, as lists of ids
        prompts = [
            [t for t, m in zip(row, attended, strict=True) if m]
            for row, attended in zip(case["prompt_ids"], case["attention_mask"], strict=True)
        ]
        lists = generate(model, prompts, **knobs)
        length = case["gen_length"]
        assert lists.sequences[:, -length:].tolist() == [row[-length:] for row in case["output_ids"]]


def test_threshold_and_quota_equal_fast_dllm_without_cache(golden_dir: Path) -> None:
    cases = json.loads((golden_dir / "fast_dllm.json").read_text())["cases"]
    plain = [case for case in cases if case["mode"] == "none"]
    assert len(cases) == 60
    assert any(case["threshold"] for case in plain)
    assert any(case["threshold"] is None for case in plain)
    for case in plain:
        model = load(golden_dir / case["checkpoint"])
        names = ("gen_length", "steps", "block_length", "threshold", "mask_id")
        out = generate(model, torch.tensor(case["prompt_ids"]), **{name: case[name] for name in names})
        assert out.sequences.tolist() == case["output_ids"], case["name"]
        assert out.reveal_step.tolist() == case["commit_forward"], case["name"]
        assert out.nfe == case["nfe_useful"], case["name"]
        assert out.token_forwards == case["nfe_useful"] * len(case["output_ids"][0]), case["name"]


@pytest.mark.parametrize("mode", ["prefix", "dual"])
def test_caches_equal_fast_dllms(golden_dir: Path, mode: str) -> None:
    """The same tokens at the same forwards, each of which feeds as many tokens, but for those that upstream runs in vain."""
    cases = [c for c in json.loads((golden_dir / "fast_dllm.json").read_text())["cases"] if c["mode"] == mode]
    assert len(cases) >= 20
    for case in cases:
        model = load(golden_dir / case["checkpoint"])
        names = ("gen_length", "steps", "block_length", "threshold", "mask_id")
        knobs = {name: case[name] for name in names}
        out = generate(model, torch.tensor(case["prompt_ids"]), cache=mode, **knobs)
        assert out.sequences.tolist() == case["output_ids"], case["name"]
        assert out.nfe == case["nfe_useful"], case["name"]
        useful = [
            n for n, idle in zip(case["forward_lengths"], case["forward_idle"], strict=True) if not idle
        ]
        assert out.token_forwards == sum(useful), case["name"]
        idle_before = [sum(case["forward_idle"][:n]) for n in range(len(case["forward_idle"]) + 1)]
        expected = [[step - idle_before[step] for step in row] for row in case["commit_forward"]]
        assert out.reveal_step.tolist() == expected, case["name"]
