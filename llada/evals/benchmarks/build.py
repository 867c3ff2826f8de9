"""A benchmark's tasks, objects of lm_eval: its configurations with the changes of catalogue.py, over files of a folder or the hub's
data sets. With a folder, nothing is asked of the network but nltk's data, by IFEval, where a machine has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from llada.errors import UserError, hint
from llada.evals.benchmarks.catalogue import BENCHMARKS, Benchmark, Row
from llada.evals.benchmarks.documents import ask_and_judge, or_no_document, settle_documents, told
from llada.evals.local_rows import read_rows
from llada.files import exists, join
from llada.settings import require

_EXAMPLES = ".fewshot.jsonl"
_TASK_NAME = re.compile(r"""^["']?task["']?:[ ]*["']?(\w[\w-]*)""", re.MULTILINE)


def check_programs(name: str, *, allow_code_execution: bool) -> None:
    """Raises UserError for a benchmark of `BENCHMARKS` whose programs may not be run."""
    require(
        allow_code_execution or not BENCHMARKS[name].runs_code,
        f"{name} runs the programs that the model writes, in a sandbox; allow it with --benchmarks.allow-code-execution",
    )


def build_tasks(
    name: str,
    *,
    data: str | None,
    num_fewshot: int | None,
    allow_code_execution: bool,
) -> list[Any]:
    """The tasks of a benchmark of `BENCHMARKS`, objects of lm_eval.

    Args:
        data: folder of .jsonl files, at any fsspec URL; None: the hub's data sets.
        num_fewshot: examples in the prompt; None: as many as the task says.

    Raises UserError: code execution that is not allowed; a file that is not there or not of the benchmark; more examples
    than there are; a package that is missing.
    """
    benchmark = BENCHMARKS[name]
    check_programs(name, allow_code_execution=allow_code_execution)
    files = _task_files(benchmark)
    rows = None if data is None else _read_rows(name, benchmark, data, files)
    tasks = []
    for task, path in files.items():
        if rows is not None and task not in rows.documents:
            continue
        config = _task_config(benchmark, path)
        if num_fewshot is not None:
            config["num_fewshot"] = num_fewshot
        documents, examples = (
            ([], []) if rows is None else (rows.documents[task], rows.examples.get(task, []))
        )
        _check_examples(name, config, None if rows is None else (len(documents), len(examples)), data)
        if rows is not None:
            _put_rows(config, name, documents, examples)
        places = [row.place for row in documents]
        tasks.append(_build_task(name, config, places, [row.place for row in examples]))
    return tasks


def _build_task(name: str, config: Mapping[str, Any], places: list[str], example_places: list[str]) -> Any:
    """The task, whose documents can be asked and judged. Raises UserError with the place of one that cannot."""
    from lm_eval.api.task import ConfigurableTask

    def build() -> Any:
        return settle_documents(ConfigurableTask(config=config))

    # Of the hub's data lm_eval's own errors say what is wrong (hub.py); of a folder's, the first document is asked in there.
    task = or_no_document(places[0], build) if places else build()
    shown = list(task.fewshot_docs()) if config.get("num_fewshot") and example_places else []
    for documents, where in ((task.eval_docs, places), (shown, example_places)):
        for number, document in enumerate(documents):
            place = where[number] if len(where) == len(documents) else f"{name}, document {number + 1}"
            or_no_document(place, partial(ask_and_judge, task, document))
    return task


def data_files(name: str, data: str) -> list[str]:
    """The files of a benchmark in a folder: its documents', and those of its examples that are there.

    Raises UserError where the documents are not.
    """
    found, benchmark = [], BENCHMARKS[name]
    for stem in benchmark.files or (name,):
        documents, examples = join(data, f"{stem}.jsonl"), join(data, f"{stem}{_EXAMPLES}")
        require(
            exists(documents),
            f"{name}: there is no {documents}; put its documents there, or leave out --benchmarks.data",
        )
        found += [documents, *([examples] if benchmark.has_file_of_examples and exists(examples) else [])]
    return found


# --- lm_eval's configurations -----------------------------------------------------------------------------------------


def _task_files(benchmark: Benchmark) -> dict[str, Path]:
    """{task: its file}, by the names that the files give them; to read a file whole takes lm_eval a hundred times as long."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / benchmark.folder
    named = {path: _TASK_NAME.search(path.read_text()) for path in sorted(folder.glob("[!_]*.yaml"))}
    found = {name[1]: path for path, name in named.items() if name and fnmatch(name[1], benchmark.tasks)}
    assert found, f"lm_eval has no {benchmark.tasks} in {folder}"
    return found


def _task_config(benchmark: Benchmark, path: Path) -> dict[str, Any]:
    """lm_eval's own configuration with the benchmark's changes."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config = load_yaml(path, resolve_func=benchmark.changes is None)
    except (ImportError, AssertionError) as error:
        raise UserError(
            f"{benchmark.title} needs a package that is not installed ({' '.join(str(error).split())}): "
            "pip install 'llada-pipelines[eval]'"
        ) from error
    if benchmark.changes is not None:
        config |= benchmark.changes(path.parent)
    for structure in ("tag", "group", "task_list"):
        config.pop(structure, None)
    return dict(config)


# --- Files of a folder ------------------------------------------------------------------------------------------------


class _Read(NamedTuple):
    place: str
    row: Row


@dataclass
class _Rows:
    documents: dict[str, list[_Read]] = field(default_factory=dict)
    examples: dict[str, list[_Read]] = field(default_factory=dict)


def _read_rows(name: str, benchmark: Benchmark, data: str, tasks: Mapping[str, Path]) -> _Rows:
    found = _Rows()
    for url in data_files(name, data):
        _sort_rows(benchmark, url, tasks, found.examples if url.endswith(_EXAMPLES) else found.documents)
    require(bool(found.documents), f"{name}: {data} holds no document of it")
    return found


def _sort_rows(
    benchmark: Benchmark, url: str, tasks: Mapping[str, Path], into: dict[str, list[_Read]]
) -> None:
    for number, raw in enumerate(read_rows(url), start=1):
        place = f"{url}, row {number}"
        for name in benchmark.fields:
            require(
                name in raw,
                f"{place} has no {name!r}, which {benchmark.title} needs; it has {', '.join(raw)}",
            )
            require(raw[name] is not None, f"{place}: {name!r}, which {benchmark.title} needs, is null")
        try:
            task = benchmark.task_of(raw) if benchmark.task_of else next(iter(tasks))
            row = benchmark.row(raw)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            reason = str(error) if type(error) is ValueError else repr(error)
            raise UserError(f"{place} is no document of {benchmark.title}: {reason}") from error
        require(task in tasks, f"{place}: {benchmark.title} has no task {task!r}; {hint(task, tasks)}")
        into.setdefault(task, []).append(_Read(place, row))


def _splits(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """(of the documents, of the examples)."""
    return (
        config.get("test_split") or config["validation_split"],
        config.get("fewshot_split") or config.get("training_split"),
    )


def _put_rows(config: dict[str, Any], name: str, documents: list[_Read], examples: list[_Read]) -> None:
    """Give a task these rows in the place of the hub's data set."""
    asked, shown = _splits(config)
    splits = {asked: _data_set(name, documents)}
    if shown != asked:
        config["fewshot_split"] = config["training_split"] = None
        if examples:
            config["fewshot_split"] = shown or "examples"
            splits[config["fewshot_split"]] = _data_set(name, examples)
    if config.get("test_split"):
        config["validation_split"] = (
            config.get("validation_split") if config.get("validation_split") in splits else None
        )
    config["dataset_kwargs"] = None
    config["custom_dataset"] = lambda **_: splits


def _data_set(name: str, rows: list[_Read]) -> Any:
    import datasets

    try:
        return datasets.Dataset.from_list([row.row for row in rows])
    except (ValueError, TypeError) as error:  # pyarrow's own are of these kinds
        raise UserError(
            f"{name}: from {rows[0].place} on, a field has values of unlike kinds: {told(error)}"
        ) from error


def _own_examples(config: Mapping[str, Any]) -> Any:
    """The examples that the prompt has whatever a folder holds, or a function of them; None: there are none."""
    return (config.get("fewshot_config") or {}).get("samples")


def _check_examples(
    name: str, config: Mapping[str, Any], num_read: tuple[int, int] | None, data: str | None
) -> None:
    """Raise UserError where the prompt asks for more examples than there are: lm_eval would take them from what it asks.

    Args:
        num_read: (documents, examples) of the folder `data`; None: the hub's.
    """
    wanted = config.get("num_fewshot") or 0
    asked, shown = _splits(config)
    if own := _own_examples(config):
        there = len(own() if callable(own) else own)
        require(
            wanted <= there,
            f"{name}: {wanted} examples asked for, and lm_eval's prompt has {there} (--benchmarks.num-fewshot)",
        )
    elif num_read is not None:
        documents, examples = num_read
        # Some benchmarks have their examples from what is asked, never the question itself.
        there = documents - 1 if shown == asked else examples
        require(
            wanted <= there,
            f"{name}: {wanted} examples asked for, and {there} are in {data}; give --benchmarks.num-fewshot {there}, or "
            f"{'more rows' if shown == asked else 'a .fewshot.jsonl with more'}",
        )
    else:
        require(
            wanted == 0 or shown is not None,
            f"{name}: {wanted} examples asked for, and its data set has none; give --benchmarks.num-fewshot 0",
        )
