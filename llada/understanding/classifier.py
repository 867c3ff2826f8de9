"""A network with a head that reads the last layer: texts in, one row of outputs each.

Shape legend: B rows, L positions, D model width, K outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from llada.errors import UserError
from llada.model.initial import draw_normal_
from llada.model.transformer import Transformer
from llada.tokenizer import encode_texts
from llada.understanding.config import Pooling


class Encoded(NamedTuple):
    """Texts as the network reads them."""

    rows: list[list[int]]
    num_cut: int
    """Rows that were longer."""


def encode_rows(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    pooling: Pooling,
    max_length: int,
) -> Encoded:
    """[BOS] text ([EOS] second text) ([EOS]): a beginning for pooling "first", an end for "last". Of a pair that does not fit the
    longer text loses its end.

    Raises UserError when the tokenizer has no beginning that is needed.
    """
    begin: list[int] = []
    if pooling == "first":
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
        if first is None:
            raise UserError(
                'the tokenizer has no token for the beginning of a text, which pooling "first" reads: take "mean"'
            )
        begin = [int(first)]
    end = [int(tokenizer.eos_token_id)] if pooling == "last" else []
    between = [int(tokenizer.eos_token_id)] if pairs is not None else []
    room = max_length - len(begin) - len(end) - len(between)
    parts = [encode_texts(tokenizer, some) for some in ([texts] if pairs is None else [texts, pairs])]
    rows, num_cut = [], 0
    for row in zip(*parts, strict=True):
        first_text, *second_text = (list(part) for part in row)
        second = second_text[0] if second_text else []
        num_cut += len(first_text) + len(second) > room
        while len(first_text) + len(second) > room:
            (first_text if len(first_text) >= len(second) else second).pop()
        # A text of no token is the end of one.
        rows.append([*begin, *first_text, *between, *second, *end] or [int(tokenizer.eos_token_id)])
    return Encoded(rows, num_cut)


class Classifier(nn.Module):
    """The head on the network."""

    def __init__(self, network: Transformer, num_outputs: int, pooling: Pooling, seed: int) -> None:
        super().__init__()
        self.network, self.pooling = network, pooling
        self.head = nn.Linear(network.config.d_model, num_outputs)
        with torch.no_grad():
            # BERT's.
            draw_normal_(self.head.weight, seed, "understanding head", 0.02)
            self.head.bias.zero_()

    def forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(B, K) of rows of token ids, in the head's precision: what stands in one row does not see another, nor any padding."""
        device = self.head.weight.device
        lengths = torch.tensor([len(row) for row in rows], device=device)
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = torch.tensor(row)
        is_text = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
        segments = None if bool(is_text.all()) else (~is_text).long()
        stream = self.network(tokens.to(device), segment_ids=segments, read_out=lambda x, _weight: x)
        stream = stream.to(self.head.weight.dtype)
        if self.pooling == "mean":
            pooled = (stream * is_text[..., None]).sum(1) / lengths[:, None]
        else:
            at = torch.zeros_like(lengths) if self.pooling == "first" else lengths - 1
            pooled = stream[torch.arange(len(rows), device=device), at]
        with torch.autocast(device.type, enabled=False):
            outputs: Tensor = self.head(pooled)
        return outputs
