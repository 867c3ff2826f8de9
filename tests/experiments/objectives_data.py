"""A text as rows that ask every objective for the same tokens, and what an autoregressive network makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from twins import EOS, FIRST_SIGN

from llada.data.tokens.shards import TokenDataset
from llada.model.predict import device_of
from llada.model.transformer import Transformer


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


def split_stories(
    stories: bytes, row_length: int, ends: Mapping[str, int]
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], int]:
    """The splits for `write_rows` and the number of ids: as many rows as `ends` says, one split behind the other at the end of
    the text, and "train", what stands before them."""
    ids = number_bytes(stories)
    rows, prompts = behind_ends(ids, row_length)
    border = len(rows) - sum(ends.values())
    splits = {"train": (rows[:border], prompts[:border])}
    for split, number in ends.items():
        splits[split] = (rows[border : border + number], prompts[border : border + number])
        border += number
    return splits, int(ids.max()) + 1


def rows_of(data: Path, split: str) -> Tensor:
    """(R, L) int64, all of them."""
    dataset = TokenDataset(str(data), split)
    return torch.from_numpy(dataset.rows(np.arange(len(dataset))).tokens)


def behind_first(rows: Tensor) -> Tensor:
    """(B, L) bool: what is asked for."""
    return (torch.arange(rows.shape[1]) > 0).expand(rows.shape)


@torch.no_grad()
def left_to_right_nats(network: Transformer, rows: Tensor) -> Tensor:
    """(B,) −log p of the rows' tokens (B, L) behind the first, of an autoregressive network."""
    nats = []
    for some in rows.to(device_of(network)).split(64):
        log_p = network(some)[:, :-1].double().log_softmax(-1)
        nats.append(-log_p.gather(2, some[:, 1:, None]).sum((1, 2)))
    return torch.cat(nats).cpu()
