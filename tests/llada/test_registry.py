"""Tables with a door: rows from outside, by name, in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llada.errors import UserError
from llada.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
TOY = """
import torch
from llada.sampling.rules import RULES, Rule

def last_first(candidates):
    slots = torch.arange(candidates.shape[1]).expand(candidates.shape)
    return candidates.exists & (slots == candidates.exists.sum(1, keepdim=True) - 1)

RULES.register("last_first")(Rule(last_first))
"""
USE = """
import torch, llada
from llada.errors import UserError
def network(tokens, **_):
    return torch.zeros(*tokens.shape, 5)
out = llada.generate(network, torch.zeros(1, 2).long(), gen_length=3, steps=9, remasking="last_first", mask_id=4)
print(out.reveal_step.tolist())
try:
    llada.generate(network, torch.zeros(1, 2).long(), remasking="last_frist", mask_id=4)
except UserError as error:
    print(error)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_find_names_the_nearest_and_register_refuses_a_taken_name() -> None:
    table: Registry[int] = Registry("number", {"one": 1, "two": 2})
    table.register("three")(3)
    assert table.find("three") == table["three"] == 3
    assert list(table) == ["one", "two", "three"]
    assert "four" not in table
    with pytest.raises(UserError, match="there is no number 'thre'; did you mean 'three'"):
        table.find("thre")
    with pytest.raises(ValueError, match="already"):
        table.register("one")(4)


def test_a_module_of_ones_own_adds_a_rule(tmp_path: Path) -> None:
    (tmp_path / "toy_rules.py").write_text(TOY)
    done = run(USE, LLADA_PLUGINS="toy_rules", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[[2, 1, 0]]",
        "there is no remasking rule 'last_frist'; did you mean 'last_first'?",
    ]


@pytest.mark.parametrize("name", ["no_such_module", "no_such_package.inner", " no_such_module , "])
def test_a_plugin_that_is_not_there_is_named(name: str) -> None:
    done = run(USE, LLADA_PLUGINS=name, PYTHONPATH=str(ROOT))
    assert f"UserError: LLADA_PLUGINS names the module {name.strip(' ,')!r}" in done.stderr


def test_a_plugin_may_import_everything_of_ours(tmp_path: Path) -> None:
    """Though it is loaded where a name is looked up, and the defaults of our own modules are looked up on import."""
    (tmp_path / "toy_all.py").write_text("import llada, pipelines.serve, pipelines.generate" + TOY)
    code = "import pipelines.generate, pipelines.serve; from llada.sampling.rules import RULES; print(*RULES)"
    done = run(code, LLADA_PLUGINS="toy_all", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "last_first"
