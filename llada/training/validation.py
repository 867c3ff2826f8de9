"""The validation bound: the same rows under the same stratified noise at every evaluation, so that curves compare."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llada.data.tokens.order import Permutation
from llada.data.tokens.shards import TokenDataset
from llada.diffusion.batch import Batch
from llada.diffusion.cross_entropy import token_cross_entropy
from llada.diffusion.likelihood import nelbo_rows, row_sums
from llada.diffusion.noise import row_keys, stream_key, uniforms
from llada.diffusion.objective import ObjectiveConfig, predicted_positions, predictors
from llada.diffusion.time import stratify
from llada.errors import UserError
from llada.model.transformer import Transformer
from llada.training.parallel import all_sum, evaluating, world


class Validation:
    """A fixed sample of the validation split.

    Masked diffusion: row i of n masks exactly l of its T tokens, l/T in stratum i, and counts Σ −log p · T/l: an unbiased
    bound whose noise levels cover [0, 1] evenly. Autoregressive: the exact negative log-likelihood.
    """

    def __init__(
        self, dataset: TokenDataset, config: ObjectiveConfig, *, num_rows: int, seed: int, micro_rows: int
    ) -> None:
        self.config, self.micro_rows = config, micro_rows
        n = min(num_rows, len(dataset))
        if n == 0:
            raise UserError(
                f"{dataset.url} has no validation rows: prepare it with a larger validation_fraction"
            )
        ids = Permutation(len(dataset), seed, 0)(np.arange(n))
        pad_to = int(dataset.lengths(ids).max()) if dataset.kind == "sft" else None
        rows = dataset.rows(ids, pad_to=pad_to)
        sample_ids, slots = torch.from_numpy(ids), torch.arange(n)
        self.batch = Batch(
            tokens=torch.from_numpy(rows.tokens),
            segment_ids=(
                torch.from_numpy(rows.segment_ids) if config.document_mask and dataset.kind != "sft" else None
            ),
            maskable=torch.from_numpy(rows.maskable),
            slots=slots,
            epochs=torch.zeros_like(slots),
            sample_ids=sample_ids,
            step=0,
            global_rows=n,
            per_row=False,
        )
        strata = stratify(uniforms(stream_key(seed, "validation-level"), sample_ids), slots, n)
        # Rows come in the order of a permutation, so stratum and content are unrelated.
        self.counts = (strata * self.batch.maskable.sum(1)).long() + 1
        self.keys = row_keys(stream_key(seed, "validation-mask"), sample_ids)

    def unigram_nats(self, counts: np.ndarray) -> float:
        """Cross-entropy of the training split's unigram distribution on these tokens (add-one), nats per token."""
        log_p = torch.from_numpy(np.log((counts + 1) / (counts + 1).sum()))
        scored = self.batch.tokens[predicted_positions(self.batch, self.config.kind)]
        return float(-log_p[scored].mean())

    def __call__(self, model: Transformer, device: torch.device, dtype: torch.dtype) -> float:
        """Nats per token over all rows. A collective: the rows are shared out among the workers."""
        rank, num_workers = world()
        n = len(self.batch.tokens)
        # Every worker runs as many forwards as the others (FSDP gathers weights together): short shares repeat a row.
        share = -(-n // num_workers)
        mine = torch.arange(rank, share * num_workers, num_workers)
        total = torch.zeros(2, dtype=torch.float64)
        with evaluating(model, device, dtype):
            for rows in mine.split(self.micro_rows):
                real = rows < n
                nats, tokens = self._score(model, rows.clamp(max=n - 1), device)
                total[0] += nats.double().cpu()[real].sum()
                total[1] += tokens.cpu()[real].sum()
        total = all_sum(total.to(device)).cpu()
        return float(total[0] / total[1])

    def _score(self, model: Transformer, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Nats and scored tokens of each row."""
        batch = self.batch.select(rows).to(device)
        predicted = predicted_positions(batch, self.config.kind)
        if self.config.kind == "autoregressive":
            targets = batch.tokens[predicted]
            nats = row_sums(
                model(
                    batch.tokens,
                    segment_ids=batch.segment_ids,
                    logits_at=predictors(predicted),
                    read_out=lambda x, weight: token_cross_entropy(x, targets, weight),
                ),
                predicted,
            )
        else:
            assert model.config.mask_token_id is not None
            nats = nelbo_rows(
                model,
                batch.tokens,
                batch.maskable,
                self.counts[rows].to(device),
                self.keys[rows].to(device),
                mask_id=model.config.mask_token_id,
                segment_ids=batch.segment_ids,
            )
        return nats, predicted.sum(1)
