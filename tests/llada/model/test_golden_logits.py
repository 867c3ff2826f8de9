"""Logits of the network against the official implementation's, on both published layouts of tiny checkpoints."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from llada.model.hf import load_model


def test_logits_equal_the_official_model(golden_dir: Path) -> None:
    golden = golden_dir
    cases = json.loads((golden / "cases.json").read_text())["cases"]
    expected = load_file(golden / "logits.safetensors")
    models = {name: load_model(golden / name) for name in ("llada_gqa", "llada_mha")}
    assert len(cases) == 12
    for case in cases:
        mask = case["attention_mask"]
        attended = torch.ones(case["logits_shape"][:2]).bool() if mask is None else torch.tensor(mask).bool()
        with torch.no_grad():
            logits = models[case["checkpoint"]](
                torch.tensor(case["input_ids"]), None if mask is None else torch.tensor(mask)
            )
        difference = (logits - expected[case["logits_key"]])[attended].abs().max()
        # The golden set's own tolerance: float32 rounding of logits between -36 and 31.
        assert difference < 2e-3, (case["name"], float(difference))
