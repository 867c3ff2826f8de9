"""What every command shares: how it reads its words, how it runs a stage, and how it ends.

A command is a file at the root of pipelines/ with a dataclass of its arguments and `main(argv)`. Its options are the
fields of the dataclass, typed and strict: `--optim.lr 1e-3`; a preset, or the JSON file of a recipe, gives the defaults.

    exit code 0      the output is complete
              1      one line: what the user can mend (UserError); or a traceback, on the terminal and in a log, and a
                     line that says where: a fault of ours or of the machine
              2      a wrong command line
              130    interrupted by Ctrl-C; 143 by SIGTERM
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import logging
import os
import select
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from llada.config import Recipe
from llada.errors import UserError
from llada.files import exists, join, local_path
from llada.presets import PRESETS, get_preset
from llada.settings import from_json, load_text
from pipelines.stage.artifact import Manifest, given_back_if_refused
from pipelines.stage.cluster import load_cluster, until_exit
from pipelines.stage.delivery import model_folder
from pipelines.stage.interruption import exit_code, ignore_signals, interruptible
from pipelines.stage.tracking import default_tracking_uri, tracked

T = TypeVar("T")
ERROR_LOG = "error.log"
# For a field whose own fields are options without its name before them: Annotated[Common, Flat].
Flat = tyro.conf.arg(name="")


@dataclasses.dataclass(frozen=True)
class Common:
    """Where a stage runs, writes and is tracked."""

    output: str
    """Folder to write, any fsspec URL. A finished one is kept as it is, an unfinished one is completed."""
    cluster: str | None = None
    """Cluster file (ray_configs/*.yaml); without one, a Ray of its own on this machine."""
    tracking_uri: str | None = None
    """MLflow; default $MLFLOW_TRACKING_URI, else an sqlite file beside the output."""
    resume: bool = False
    """Insist that the output was begun before (going on is the default anyway). A finished training goes on to a new length."""
    progress: bool = True
    """Show progress bars."""


# --- A command from its beginning to its end --------------------------------------------------------------------------


def run_command(name: str, argv: Sequence[str] | None = None, *, ends_process: bool = True) -> None:
    """Run the command `name` with these words (by default the process's own). Raises SystemExit unless it succeeds;
    `ends_process`: nothing comes after it."""
    _quiet()
    with contextlib.ExitStack() as last:
        if ends_process:
            last.enter_context(until_exit())
            last.callback(ignore_signals)
        last.enter_context(exit_codes(name))
        # By its name also under `python -m`, where its file runs as __main__: what it sends to Ray's workers must be
        # importable there.
        command = importlib.import_module(f"pipelines.{name.replace('-', '_')}")
        command.main(list(sys.argv[1:] if argv is None else argv))


@contextlib.contextmanager
def exit_codes(name: str, output: str | None = None) -> Iterator[None]:
    """Turn every exception of the block into what the user should see of it, and SystemExit (see the top).

    A traceback is kept in `<output>/logs/error.log` when the output is local and begun, else in a temporary file. With an
    `output` the block is a stage: nothing in it may end the process, also not as if it had succeeded.
    """
    try:
        with interruptible():
            yield
            sys.stdout.flush()
    except UserError as error:
        print(f"llada {name}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        goes_on = "; the same command goes on where it stopped" if output else ""
        print(f"llada {name}: interrupted{goes_on}", file=sys.stderr)
        raise SystemExit(exit_code()) from None
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and output is None:
            raise
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            raise SystemExit(1) from None
        text = "".join(traceback.format_exception(error))
        log = _write_log(text, output)
        print(
            f"{text}llada {name}: a fault of ours or of the machine; its traceback is above and in {log}",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


def parse_entrypoint(line: str) -> None:
    """Read a command line of a stage, `llada prepare …` or `python -m pipelines.prepare …`, as the stage itself would, and go
    no further. Raises UserError with what is wrong in it."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UserError(f"is no command line ({error})") from None
    match words:
        case ["llada", name, *arguments]:
            pass
        case [python, "-m", module, *arguments] if os.path.basename(python).startswith("python"):
            name = module.removeprefix("pipelines.").replace("_", "-")
        case _:
            raise UserError("is neither `llada <stage> …` nor `python -m pipelines.<stage> …`")
    parse_stage(name, arguments)


def parse_stage(name: str, words: Sequence[str]) -> Any:
    """The arguments that the stage `name` makes of these words, as it would itself; nothing else happens. Raises UserError."""
    parse_words = None
    if (Path(__file__).parents[1] / f"{name.replace('-', '_')}.py").exists():
        command = importlib.import_module(f"pipelines.{name.replace('-', '_')}")
        parse_words = getattr(command, "parse_words", None)
    if parse_words is None:
        raise UserError(f"names no stage that a job can run: {name!r}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            parsed = parse_words(words)
    except SystemExit:
        text = " ".join(said.getvalue().translate(str.maketrans("╭╮╰╯─│", "      ")).split())
        raise UserError(f"does not parse: {text}") from None
    return parsed[0] if isinstance(parsed, tuple) else parsed


def _reader_has_gone() -> bool:
    """Whether nobody reads the output any more, as in `llada plan small | head -1`."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # a stream within this process, such as a notebook's
        return False
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    # Or Python would write the rest at its end, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _write_log(text: str, output: str | None) -> Path:
    """Append a traceback to the log of the output, or put it into a temporary file; where it is."""
    entry = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {shlex.join(sys.argv)}\n{text}\n"
    local = local_path(output) if output else None
    # A folder that no stage has begun must stay empty, or the next attempt would be refused.
    if local and any(os.path.exists(join(local, begun)) for begun in ("stage.json", "logs")):
        log = Path(local, "logs", ERROR_LOG)
        with contextlib.suppress(OSError):
            log.parent.mkdir(exist_ok=True)
            with log.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(entry)
            return log
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", errors="backslashreplace", prefix="llada-", suffix=".log", delete=False
    ) as file:
        file.write(entry)
    return Path(file.name)


def _quiet() -> None:
    """Our own warnings show as single lines; those of libraries that users cannot act on do not."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore", module=r"(torch|ray|mlflow|transformers|pydantic|google)\b.*")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")


# --- Words ------------------------------------------------------------------------------------------------------------


def take_recipe(argv: Sequence[str], command: str) -> tuple[Recipe, list[str]]:
    """The preset that the first word names (or a recipe's JSON file), and the other words."""
    words = list(argv)
    if not words or words[0].startswith("-"):
        if any(word in ("-h", "--help") for word in words):
            return get_preset("tiny"), words
        raise UserError(f"name a preset first: llada {command} <{'|'.join(PRESETS)}|recipe.json> …")
    if words[0].endswith(".json"):
        text = load_text(words[0], "recipe")
        return from_json(Recipe, text), words[1:]
    return get_preset(words[0]), words[1:]


def parse(kind: type[T], argv: Sequence[str], command: str, /, **defaults: Any) -> T:
    """A command's arguments; `defaults` are the fields' values where the words say nothing.

    A wrong command line ends the process with exit code 2.
    """
    default: Any = tyro.MISSING_NONPROP
    if defaults:
        unset = {
            f.name: tyro.MISSING_NONPROP if f.default is dataclasses.MISSING else f.default
            for f in dataclasses.fields(kind)  # type: ignore[arg-type]
        }
        default = kind(**unset | defaults)
    return tyro.cli(kind, args=argv, prog=f"llada {command}", default=default)


def parse_known(kind: type[T], words: Sequence[str], command: str) -> T:
    """Those of the words that are options of `kind`; for an option that decides the defaults of the others."""
    known, _ = tyro.cli(kind, args=words, prog=f"llada {command}", return_unknown_args=True, add_help=False)
    return known


# --- A stage ----------------------------------------------------------------------------------------------------------


def run_stage(
    stage: str,
    function: Callable[..., Manifest],
    common: Common,
    *args: Any,
    preset: str | None = None,
    **kwargs: Any,
) -> Manifest:
    """Call a stage inside its MLflow run; its manifest.

    `preset` is what the first word of the command line was. A `model` among the keywords may be of MLflow's registry.
    """
    if common.resume and not exists(join(common.output, "stage.json")):
        raise UserError(f"--resume: nothing was begun in {common.output}")
    cluster = load_cluster(common.cluster)
    uri = common.tracking_uri or default_tracking_uri(common.output)
    name = preset and Path(preset).stem
    with (
        exit_codes(stage, common.output),
        given_back_if_refused(common.output),
        tracked(stage, common.output, uri=uri, preset=name) as tracker,
    ):
        if kwargs.get("model"):
            kwargs["model"] = model_folder(kwargs["model"], uri)
        return function(
            *args,
            output=common.output,
            cluster=cluster,
            tracker=tracker,
            progress=common.progress,
            **kwargs,
        )
