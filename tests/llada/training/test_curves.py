"""Losses of small runs, step by step, as they were: what changes an objective, its noise, its order or a move of the weights is
seen here, and says so in its commit. `WRITE_GOLDEN=1 pytest tests/llada/training/test_curves.py` writes them anew.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parents[2] / "golden" / "training_curves.json"
CURVES: dict[str, dict[str, Any]] = {
    "llada": {},
    "mdlm": {"schedule": "loglinear", "subs": True},
    "muon, micro-batches": {"optimizer": "muon", "micro_batch_rows": 3},
    "autoregressive": {"kind": "autoregressive", "causal": True},
    "block diffusion": {"kind": "block_diffusion", "block_length": 4},
    "fine-tuning": {"data": "sft"},
}
# Another processor sums in another order, which twelve steps enlarge; Muon orthogonalises in bfloat16 where there is such.
ROUNDING = {name: 0.03 if "muon" in name else 1e-4 for name in CURVES}


@pytest.mark.parametrize("name", CURVES)
def test_losses_are_those_of_before(
    name: str,
    make_config: Callable,
    run_here: Callable,
    pretrain_folder: Any,
    sft_folder: Any,
    tmp_path: Path,
) -> None:
    knobs = dict(CURVES[name])
    folder = sft_folder if knobs.pop("data", "") else pretrain_folder
    configs = make_config(**{"num_steps": 12, **knobs})
    losses = run_here(configs, folder, tmp_path / "once").losses
    assert losses == run_here(configs, folder, tmp_path / "again").losses  # bit for bit
    curves = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("WRITE_GOLDEN"):
        curves[name] = losses
        GOLDEN.write_text(json.dumps(curves, indent=1) + "\n")
    assert losses == pytest.approx(curves[name], rel=ROUNDING[name])
