"""From the step number to a worker's rows and their noise: pure arithmetic, no state to save.

Slot s of step k is stream position k · G + s (G rows in a global batch), whose row, mask and noise level follow from the
seed. Worker r of W takes the slots r, r + W, …; nothing else depends on r or W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from llada.data.tokens.order import stream_indices
from llada.data.tokens.shards import TokenDataset
from llada.diffusion.noise import row_keys, row_uniforms, stream_key, uniforms
from llada.diffusion.objective import NoisyBatch, forward_process
from llada.diffusion.schedule import get_schedule
from llada.diffusion.time import TimeConfig, sample_uniform, time_and_weight

Objective = Literal["masked_diffusion", "autoregressive"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned. schedule "llada" is LLaDA, "loglinear" MDLM, "bert" with masked_diffusion the 15 % baseline."""

    objective: Objective = "masked_diffusion"
    schedule: str = "llada"
    time: TimeConfig = TimeConfig()
    subs: bool = False  # MDLM: the mask token's logit is −∞ in the loss too
    document_mask: bool = True  # a token attends only to its own document; LLaDA-8B was trained without
    random_length: float = 0.0  # share of steps cut to a random length (LLaDA: 0.01)

    def __post_init__(self) -> None:
        get_schedule(self.schedule)
        if not 0 <= self.random_length <= 1:
            raise ValueError(f"objective: random_length {self.random_length} is not a probability")
        if self.objective not in ("masked_diffusion", "autoregressive"):
            raise ValueError(f"objective {self.objective!r} is neither masked_diffusion nor autoregressive")


@dataclass(frozen=True)
class Batch:
    """One worker's rows of one step (b of the global batch's G)."""

    tokens: Tensor  # (b, L) int64
    segment_ids: Tensor | None  # (b, L), None where every position may see every other
    maskable: Tensor  # (b, L) bool
    slots: Tensor  # (b,) places in the global batch
    epochs: Tensor  # (b,)
    sample_ids: Tensor  # (b,)
    step: int
    global_rows: int
    per_row: bool  # SFT: each row counts alike, divided by its own answer length

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor replaced by function(tensor)."""
        mapped: dict[str, Any] = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **mapped)

    def select(self, rows: slice | Tensor) -> Batch:
        """Some of the rows; they keep their slots and ids."""
        return self.map(lambda tensor: tensor[rows])

    def split(self, rows: int) -> Iterator[Batch]:
        """Micro-batches of at most this many rows."""
        for start in range(0, len(self.tokens), rows):
            yield self.select(slice(start, start + rows))

    def to(self, device: torch.device) -> Batch:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


class BatchStream:
    """The endless, shuffled stream of a split, cut into global batches; the next one loads while this one trains."""

    def __init__(
        self,
        dataset: TokenDataset,
        config: ObjectiveConfig,
        *,
        global_rows: int,
        seed: int,
        rank: int,
        num_workers: int,
    ) -> None:
        if global_rows % num_workers:
            raise ValueError(
                f"a global batch of {global_rows} rows cannot be shared out among {num_workers} workers: "
                "choose global_batch_tokens so that its rows divide by the number of workers"
            )
        self.dataset, self.config, self.seed = dataset, config, seed
        self.global_rows, self.rank, self.num_workers = global_rows, rank, num_workers

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """This worker's batches of the steps [first_step, last_step)."""
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(self.load, first_step)
            for step in range(first_step, last_step):
                batch = future.result()
                if step + 1 < last_step:
                    future = pool.submit(self.load, step + 1)
                yield batch

    def load(self, step: int) -> Batch:
        G = self.global_rows
        epochs, ids = stream_indices(len(self.dataset), self.seed, step * G, G)
        mine = np.arange(self.rank, G, self.num_workers)
        sft = self.dataset.kind == "sft"
        # LLaDA pads a mini-batch with EOS to its longest row. Here it is the global batch, so that the padding, which
        # is learned, does not depend on how rows are spread over workers.
        pad_to = int(self.dataset.lengths(ids, epochs).max()) if sft else None
        rows = self.dataset.rows(ids[mine], pad_to, epochs[mine])
        length = self._random_length(step, rows.tokens.shape[1])
        segments = torch.from_numpy(rows.segment_ids[:, :length])
        return Batch(
            tokens=torch.from_numpy(rows.tokens[:, :length]),
            segment_ids=segments if self.config.document_mask and not sft else None,
            maskable=torch.from_numpy(rows.maskable[:, :length]),
            slots=torch.from_numpy(mine),
            epochs=torch.from_numpy(epochs[mine]),
            sample_ids=torch.from_numpy(ids[mine]),
            step=step,
            global_rows=G,
            per_row=sft,
        )

    def _random_length(self, step: int, length: int) -> int:
        """LLaDA's random length: rarely, a whole batch is cut to U{1 … L}; the same decision on every worker."""
        if self.config.random_length == 0 or self.dataset.kind == "sft":
            return length
        draw = uniforms(stream_key(self.seed, "random-length", step), torch.arange(2))
        return int(draw[1] * length) + 1 if float(draw[0]) < self.config.random_length else length


def add_noise(batch: Batch, config: ObjectiveConfig, seed: int, mask_id: int) -> NoisyBatch:
    """xₜ of these rows: the mask from (seed, epoch, sample), the noise level from `config.time`."""
    u = sample_uniform(
        config.time.sampling,
        seed=seed,
        step=batch.step,
        slots=batch.slots,
        batch=batch.global_rows,
        epochs=batch.epochs,
        sample_ids=batch.sample_ids,
    )
    t, weight = time_and_weight(u, get_schedule(config.schedule), config.time)
    keys = torch.empty_like(batch.sample_ids)
    for epoch in batch.epochs.unique().tolist():
        here = batch.epochs == epoch
        keys[here] = row_keys(stream_key(seed, "train-mask", epoch), batch.sample_ids[here])
    return forward_process(
        batch.tokens,
        t=t,
        schedule=config.schedule,
        maskable=batch.maskable,
        mask_id=mask_id,
        uniform=row_uniforms(keys, batch.tokens.shape[1]),
        weight=weight,
    )


def predicted_positions(batch: Batch, objective: Objective) -> Tensor:
    """(b, L) bool: what the loss is about. Autoregressive: what has a predecessor in its own document."""
    if objective == "masked_diffusion":
        return batch.maskable
    predicted = batch.maskable.clone()
    predicted[:, 0] = False
    if batch.segment_ids is not None:
        predicted[:, 1:] &= batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    return predicted
