"""From the step number to a worker's rows, noised and ready for its device: pure arithmetic, no state to save.

Slot s of step k is stream position k · G + s (G rows in a global batch), whose row follows from the seed. Worker r of W takes
the slots r, r + W, …; nothing else depends on r or W. All workers run as many micro-batches, of the same sizes: those that
have no slot of their own left fill up with a row of which nothing is learned.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from llada.data.tokens.order import stream_indices
from llada.data.tokens.shards import TokenDataset
from llada.diffusion.batch import Batch, MicroBatch
from llada.diffusion.objective import ObjectiveConfig, corrupt, predicted_positions
from llada.model.transformer import ModelConfig
from llada.training.lengths import vary_lengths

PREFETCHED = 6
"""Steps that are made ready ahead of time: a slow answer of an object store is not felt."""
# How long the end of a run waits for the one that is being made, which a store that is away may take half an hour for.
_CLOSE_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class StepBatch:
    """What one worker does in one step."""

    step: int
    """0-based."""
    micro: list[MicroBatch]
    counted: Tensor | None
    """() int64: how many of this worker's tokens the loss is a mean over; None where each row is divided by its own
    already."""
    tokens: int
    """Of all workers, padding included."""

    def to(self, device: torch.device) -> StepBatch:
        """The same on another device, on its way there when this returns."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        counted = None if self.counted is None else move(self.counted)
        return replace(self, micro=[micro.map(move) for micro in self.micro], counted=counted)

    def pinned(self) -> StepBatch:
        """The same in memory that a GPU copies from by itself."""
        counted = None if self.counted is None else self.counted.pin_memory()
        return replace(self, micro=[micro.map(Tensor.pin_memory) for micro in self.micro], counted=counted)


def cut_evenly(rows: int, at_most: int) -> list[int]:
    """The sizes of as few micro-batches as hold so many rows, of at most `at_most`, the larger ones by one row first."""
    number = max(1, -(-rows // at_most))
    return [rows // number + (i < rows % number) for i in range(number)]


class BatchStream:
    """The endless, shuffled stream of a split, cut into global batches; the next ones are made while this one trains."""

    def __init__(
        self,
        dataset: TokenDataset,
        config: ObjectiveConfig,
        model: ModelConfig,
        *,
        global_rows: int,
        micro_rows: int,
        seed: int,
        rank: int,
        num_workers: int,
    ) -> None:
        self.dataset, self.config, self.model, self.seed = dataset, config, model, seed
        self.global_rows, self.rank, self.num_workers = global_rows, rank, num_workers
        self.rows = -(-global_rows // num_workers)
        self.sizes = cut_evenly(self.rows, micro_rows)
        self._waited = 0.0
        self._making = threading.Lock()

    def batches(
        self, first_step: int, last_step: int, *, pinned: bool = False
    ) -> Generator[StepBatch, None, None]:
        """This worker's part of the steps [first_step, last_step), in pinned memory if asked."""
        ready: SimpleQueue[StepBatch | Exception] = SimpleQueue()
        room, over = threading.Semaphore(PREFETCHED), threading.Event()

        def make_all() -> None:
            try:
                for step in range(first_step, last_step):
                    room.acquire()
                    with self._making:  # one that was left behind may still be at it
                        if over.is_set():
                            return
                        batch = self.prepare(step)
                        ready.put(batch.pinned() if pinned else batch)
            except Exception as error:
                ready.put(error)

        # A daemon, for which the end of the process does not wait either.
        thread = threading.Thread(target=make_all, name="batches", daemon=True)
        thread.start()
        try:
            for _ in range(first_step, last_step):
                since = time.perf_counter()
                batch = ready.get()
                self._waited += time.perf_counter() - since
                if isinstance(batch, Exception):
                    raise batch
                room.release()
                yield batch
        finally:
            over.set()
            room.release()
            thread.join(_CLOSE_TIMEOUT_S)

    def read_wait(self) -> float:
        """Seconds that `batches` has kept the loop waiting since the last reading."""
        waited, self._waited = self._waited, 0.0
        return waited

    def prepare(self, step: int) -> StepBatch:
        """This worker's micro-batches of a step, noised.

        Each row is divided by a number that knows the whole global batch (its token count, or rows × answer length in
        SFT), so micro-batches and workers add up to the same gradient however the rows are split.
        """
        batch = self.load(step)
        counts = predicted_positions(batch, self.config.kind).sum(1)
        per_row = counts.clamp(min=1) * batch.global_rows if batch.per_row else torch.ones_like(counts)
        pieces = zip(batch.split(self.sizes), per_row.split(self.sizes), strict=True)
        return StepBatch(
            step=step,
            micro=[
                corrupt(
                    rows,
                    self.config,
                    normalizer=normalizer,
                    seed=self.seed,
                    mask_id=self.model.mask_token_id,
                    block_length=self.model.block_length,
                )
                for rows, normalizer in pieces
            ],
            counted=None if batch.per_row else counts.sum(),
            tokens=self.global_rows * batch.tokens.shape[1],
        )

    def load(self, step: int) -> Batch:
        """This worker's rows of a step, those that only fill up last: of them nothing may be masked."""
        G = self.global_rows
        epochs, ids = stream_indices(len(self.dataset), self.seed, step * G, G)
        mine = np.arange(self.rank, G, self.num_workers)
        own = len(mine)
        mine = np.resize(mine if own else np.zeros(1, dtype=np.int64), self.rows)
        sft = self.dataset.kind == "sft"
        # LLaDA pads a mini-batch with EOS to its longest row. Here it is the global batch, so that the padding, which
        # is learned, does not depend on how rows are spread over workers.
        pad_to = int(self.dataset.lengths(ids, epochs).max()) if sft else None
        rows = self.dataset.rows(ids[mine], pad_to, epochs[mine])
        segments, maskable = torch.from_numpy(rows.segment_ids), torch.from_numpy(rows.maskable)
        maskable[own:] = False
        batch = Batch(
            tokens=torch.from_numpy(rows.tokens),
            segment_ids=segments if self.config.document_mask and not sft else None,
            maskable=maskable,
            slots=torch.from_numpy(mine),
            epochs=torch.from_numpy(epochs[mine]),
            sample_ids=torch.from_numpy(ids[mine]),
            step=step,
            global_rows=G,
            per_row=sft,
        )
        return batch if sft else vary_lengths(batch, self.config, self.seed)
