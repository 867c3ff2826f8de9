"""state.json, the last file of a checkpoint: whose it is, where that run was, and the checksums of the other files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llada.files import filesystem, join, write_bytes
from llada.settings import from_dict
from llada.training.checkpoint.folder import STATE_FILE, checkpoint_url


class DamagedError(Exception):
    """A checkpoint cannot be read; the message names its file."""


@dataclass(frozen=True)
class Cursor:
    """Where a run is: all that a checkpoint holds beside tensors. The data position is the step."""

    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Trained on so far, those of skipped steps included."""
    seconds: float = 0.0
    """Spent so far, attempts before this one included."""
    train_loss: float = float("nan")
    """Last logged, nats per token."""
    interval_loss: float = 0.0
    """Summed since then."""
    interval_steps: int = 0
    """Those of it whose loss was a finite number."""
    interval_noise: tuple[float, ...] = ()
    """Of the same steps, for each tenth of mask probabilities one after the other: Σ −log p of the masked tokens, their
    number."""
    bad_steps: int = 0
    """The last ones, in a row, whose loss or gradient was not."""
    skipped_steps: int = 0
    """All such steps since the start, those that were done again included."""
    rollbacks: int = 0
    """How often the run went back to a checkpoint because of them."""
    lr_scale: float = 1.0
    """What the scheduled learning rates are multiplied with since then."""


def write_state(
    folder: str, cursor: Cursor, identity: Mapping[str, Any], files: Mapping[str, list[int]]
) -> None:
    """Complete the checkpoint of the cursor's step. `files`: {name: [bytes, CRC-32]} of all its other files."""
    state = {"identity": identity, **asdict(cursor), "files": files}
    state["checksum"] = _checksum(state)
    url = join(checkpoint_url(folder, cursor.step), STATE_FILE)
    write_bytes(url, json.dumps(state, indent=2).encode())


def read_state(folder: str, step: int) -> dict[str, Any]:
    """What a checkpoint's state.json holds: "identity", the fields of `Cursor`, and "files" where checksums were kept:
    {name: [bytes, CRC-32]}. Raises DamagedError."""
    fs, root = filesystem(folder)
    url = join(checkpoint_url(folder, step), STATE_FILE)
    try:
        state = json.loads(fs.cat_file(join(checkpoint_url(root, step), STATE_FILE)))
        checksum = state.pop("checksum", None)
        if checksum not in (None, _checksum(state)):
            raise DamagedError(f"{url} has another checksum than when it was written")
        objective = state["identity"]["objective"]
        if "objective" in objective:  # older checkpoints call its kind so, and have no checksum
            objective["kind"] = objective.pop("objective")
        cursor = {name: value for name, value in state.items() if name not in ("identity", "files")}
        if from_dict(Cursor, cursor).step != step or not isinstance(state.get("files", {}), dict):
            raise ValueError(f"it is not that of step {step}")
    except (ValueError, TypeError, AttributeError, LookupError, IsADirectoryError) as error:
        raise DamagedError(f"{url} is damaged ({type(error).__name__}: {error})") from error
    return state


def _checksum(state: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())
