"""Plain lm_eval knows the model "llada", keeps its own, and no other Python pays for it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from llada.evals import plugin

HOOK = Path(plugin.__file__).with_name("llada_lm_eval.pth").read_text()


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
@pytest.mark.parametrize(
    "first", ["", "import llada.evals.harness\n"], ids=["by its name", "imported before"]
)
def test_the_model_stands_beside_lm_evals_own(first: str) -> None:
    code = f"""{HOOK}
{first}import lm_eval.models
from lm_eval.api.registry import get_model, model_registry
print(get_model("llada").__module__, get_model("dummy").__module__, "hf" in model_registry)
"""
    assert _run(code) == "llada.evals.harness lm_eval.models.dummy True\n"


def test_lm_eval_is_not_imported_by_it_nor_anything_dear() -> None:
    code = f"""import sys
before = set(sys.modules)
{HOOK}
print(*sorted(set(sys.modules) - before))
"""
    there = set(_run(code).split())
    assert there <= {"__future__", "importlib", "warnings", "llada", "llada.evals", "llada.evals.plugin"}
