"""Data sets of the Hugging Face hub that cannot be had, as one line with what to do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from llada.errors import UserError


@contextlib.contextmanager
def data_errors(name: str, *, takes_folder: bool) -> Iterator[None]:
    """For a `with` block in which lm_eval loads or reads the data of the task `name`: what it cannot have is a UserError.

    Args:
        takes_folder: whether --benchmarks.data could have it.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (ConnectionError, FileNotFoundError, HfHubHTTPError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        folder = "put its rows into a folder and name that with --benchmarks.data" if takes_folder else ""
        ways = " or ".join(way for way in (_remedy(error, said), folder) if way)
        raise UserError(f"the data of {name} cannot be had: {said}{f'; {ways}' if ways else ''}") from error


def _remedy(error: Exception, said: str) -> str:
    if "gated" in said:
        return "accept its terms on its page there and set HF_TOKEN,"
    if isinstance(error, ConnectionError):
        offline = next(
            (name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name)), None
        )
        return (
            f"unset {offline},"
            if offline
            else "try again where there is a network (HF_ENDPOINT names a mirror),"
        )
    return ""
