"""The command `track`: hands MLflow what stages could not deliver, say because the server was away.

Every output folder keeps it in `tracking-undelivered.jsonl`; the file goes when all of it is delivered. Doing it twice
changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from llada.errors import UserError
from llada.files import absolute, exists, file_sizes, join
from llada.settings import require
from pipelines.stage.artifact import UNDELIVERED_FILE, link_run
from pipelines.stage.command import parse, run_command
from pipelines.stage.delivery import Delivery, read_undelivered, write_undelivered
from pipelines.stage.tracking import default_tracking_uri


@dataclass(frozen=True)
class TrackArgs:
    """Deliver to MLflow what stages could not."""

    folders: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Output folders of stages, or folders that hold some."""
    tracking_uri: str | None = None
    """MLflow; default $MLFLOW_TRACKING_URI, else an sqlite file beside each output."""


def main(argv: Sequence[str]) -> None:
    """`llada track FOLDER …`"""
    args = parse(TrackArgs, argv, "track")
    require(bool(args.folders), "name the folders whose stages are to be delivered: llada track FOLDER …")
    failures = []
    for folder in args.folders:
        require(exists(absolute(folder)), f"there is no folder {folder}")
        outputs = find_undelivered(absolute(folder))
        if not outputs:
            print(f"{folder}: everything is delivered")
        for output in outputs:
            uri = args.tracking_uri or default_tracking_uri(output)
            left = deliver(output, uri)
            print(f"{output}: {'delivered' if not left else f'{len(left)} calls are left'} ({uri})")
            failures += left
    if failures:
        raise UserError(
            f"MLflow did not take {len(failures)} calls ({failures[0]}); they are kept where they were"
        )


def find_undelivered(folder: str) -> list[str]:
    """The output folders at or below `folder` that have something to deliver."""
    names = [name for name in file_sizes(folder) if name.split("/")[-1] == UNDELIVERED_FILE]
    return sorted(join(folder, name).removesuffix(f"/{UNDELIVERED_FILE}") for name in names)


def deliver(output: str, uri: str) -> list[str]:
    """Hand over what is kept in the folder `output`; why what is left of it was not taken, a line each."""
    begin, calls = read_undelivered(output)
    if begin is None:
        return []
    delivery = Delivery(uri, output)
    try:
        delivery.open(**begin[1])
    except Exception as error:
        return [_reason(error)] * len(calls)
    left, reasons = [], []
    for call in calls:
        try:
            delivery(call)
        except Exception as error:
            left.append(call)
            reasons.append(f"{call[0]}: {_reason(error)}")
    assert delivery.run_id is not None
    link_run(output, delivery.run_id)
    write_undelivered(output, None, left)
    return reasons


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


if __name__ == "__main__":
    run_command("track")
