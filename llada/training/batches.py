"""From the step number to a worker's rows: pure arithmetic, no state to save.

Slot s of step k is stream position k · G + s (G rows in a global batch), whose row follows from the seed. Worker r of W takes the slots r, r + W, …; nothing else depends on r or W.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from llada.data.tokens.order import stream_indices
from llada.data.tokens.shards import TokenDataset
from llada.diffusion.batch import Batch
from llada.diffusion.objective import ObjectiveConfig
from llada.settings import require
from llada.training.lengths import vary_lengths


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
        require(
            global_rows % num_workers == 0,
            f"a global batch of {global_rows} rows cannot be shared out among {num_workers} workers: "
            "choose train.global_batch_tokens so that its rows divide by the number of workers",
        )
        self.dataset, self.config, self.seed = dataset, config, seed
        self.global_rows, self.rank, self.num_workers = global_rows, rank, num_workers

    def batches(self, first_step: int, last_step: int) -> Generator[Batch, None, None]:
        """This worker's batches of the steps [first_step, last_step)."""
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(self.load, first_step)
            for step in range(first_step, last_step):
                batch = future.result()
                if step + 1 < last_step:
                    future = pool.submit(self.load, step + 1)
                yield batch

    def load(self, step: int) -> Batch:
        """This worker's rows of a step."""
        G = self.global_rows
        epochs, ids = stream_indices(len(self.dataset), self.seed, step * G, G)
        mine = np.arange(self.rank, G, self.num_workers)
        sft = self.dataset.kind == "sft"
        # LLaDA pads a mini-batch with EOS to its longest row. Here it is the global batch, so that the padding, which
        # is learned, does not depend on how rows are spread over workers.
        pad_to = int(self.dataset.lengths(ids, epochs).max()) if sft else None
        rows = self.dataset.rows(ids[mine], pad_to, epochs[mine])
        segments = torch.from_numpy(rows.segment_ids)
        batch = Batch(
            tokens=torch.from_numpy(rows.tokens),
            segment_ids=segments if self.config.document_mask and not sft else None,
            maskable=torch.from_numpy(rows.maskable),
            slots=torch.from_numpy(mine),
            epochs=torch.from_numpy(epochs[mine]),
            sample_ids=torch.from_numpy(ids[mine]),
            step=step,
            global_rows=G,
            per_row=sft,
        )
        return batch if sft else vary_lengths(batch, self.config, self.seed)
