"""The text of `objectives.py` as rows that ask every objective for the same tokens."""

from __future__ import annotations

import numpy as np
from twins import EOS, FIRST_SIGN


def number_bytes(stories: bytes) -> np.ndarray:
    """Ids (N,) of the bytes, in the order of those that occur, from FIRST_SIGN on; between two stories EOS."""
    text = stories.replace(b"<|endoftext|>", b"\0").strip(b"\0")
    values, ids = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    ids = ids + FIRST_SIGN - (values[0] == 0)
    return np.where(ids < FIRST_SIGN, EOS, ids)


def behind_ends(ids: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (R, L) of EOS and the next L − 1 of the ids (N,), what is left over dropped; of each the prompt's length (R,), 1: EOS
    is in front as a prompt is, seen and never asked for."""
    asked = row_length - 1
    rows = np.full((len(ids) // asked, row_length), EOS, np.uint32)
    rows[:, 1:] = ids[: len(rows) * asked].reshape(len(rows), asked)
    return rows, np.ones(len(rows), np.int64)


def held_out_stories(
    stories: bytes, row_length: int, held_out_rows: int
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], int]:
    """The splits for `write_rows`, of which the last rows are held out, and the number of ids."""
    ids = number_bytes(stories)
    rows, prompts = behind_ends(ids, row_length)
    splits = {
        "train": (rows[:-held_out_rows], prompts[:-held_out_rows]),
        "validation": (rows[-held_out_rows:], prompts[-held_out_rows:]),
    }
    return splits, int(ids.max()) + 1
