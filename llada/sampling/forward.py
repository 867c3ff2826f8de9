"""The forward of a step: logits at the planned positions of each row, guidance applied, whatever rows go together.

A network of ours gets the rows that are at work laid end to end, of each the columns that its cache mode chooses (cache.py,
packed.py), or those that are not finished, of a block-causal one (blocks.py). Any function of (tokens) gets whole rows, those between the same columns together, and knows no cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llada.model.predict import Model, device_of, guided_predict, network_block, takes_packed_rows
from llada.sampling.blocks import settled_columns
from llada.sampling.cache import KeyValues, Stretch, View, choose_columns
from llada.sampling.canvas import Canvas, Step, attended_span
from llada.sampling.packed import Fed, packed_forward
from llada.settings import require


@torch.no_grad()
def forward(model: Model, canvas: Canvas, step: Step) -> Tensor:
    """Logits (N, V) at the step's positions, in row-major order, guidance applied; counts the tokens that it feeds."""
    if takes_packed_rows(model):
        return _forward_packed(model, canvas, step)
    return _forward_plain(model, canvas, step)


def columns_to_feed(canvas: Canvas, step: Step) -> list[tuple[Stretch, Stretch]]:
    """Of each row at work: the columns that may be seen, and those of them that its next forward feeds."""
    notes = (
        canvas.first,
        canvas.stop,
        canvas.block_begin,
        canvas.block_end,
        canvas.forwards,
        canvas.step,
        canvas.block,
    )
    table = torch.stack(notes)[:, step.rows].T.tolist()
    chosen = []
    for row, (first, stop, begin, end, forwards, age, block) in zip(step.rows.tolist(), table, strict=True):
        config, cache = canvas.configs[row], canvas.caches[row]
        if canvas.network_block is not None:
            chosen.append(settled_columns(Stretch(first, stop), block, canvas.network_block, cache))
            continue
        if config.suffix_window is not None:
            stop = min(stop, end + config.suffix_window)
        view = View(Stretch(first, stop), Stretch(begin, min(end, stop)), forwards, config)
        chosen.append((view.row, choose_columns(view, cache, is_new_block=age == 0)))
    return chosen


def _forward_packed(model: Model, canvas: Canvas, step: Step) -> Tensor:
    assert canvas.network_block == network_block(model), "the canvas was laid out for another network"
    scales = canvas.cfg_scale[step.rows]
    fed: list[tuple[Fed, Tensor]] = []
    unguided: list[tuple[Fed, Tensor]] = []
    stretches = columns_to_feed(canvas, step)
    for row, where, scale, (seen, columns) in zip(
        step.rows.tolist(), step.where, scales.tolist(), stretches, strict=True
    ):
        part, copies = slice(*columns), 1 + (scale != 0)
        stores: Sequence[KeyValues | None] = (None, None)
        if canvas.configs[row].cache is not None or canvas.network_block is not None:
            stores = canvas.caches[row].stores_for(canvas.tokens.shape[1] - seen.begin, copies)
        at = where[part].nonzero().squeeze(1)
        tokens = canvas.tokens[row, part]
        begin, length = columns.begin - seen.begin, seen.end - seen.begin
        fed.append((Fed(tokens, begin, length, stores[0]), at))
        if scale != 0:
            hidden = tokens.masked_fill(canvas.prompt[row, part], canvas.mask_id)
            unguided.append((Fed(hidden, begin, length, stores[1]), at))
    logits = packed_forward(model, [*fed, *unguided])
    for row, scale, (seen, columns) in zip(step.rows.tolist(), scales.tolist(), stretches, strict=True):
        cache = canvas.caches[row]
        cache.age = 0 if columns == seen else cache.age + 1
        if canvas.network_block is not None:
            cache.settled = (seen.end - seen.begin - 1) // canvas.network_block * canvas.network_block
        canvas.token_forwards[row] += (columns.end - columns.begin) * (1 + (scale != 0))
    if not unguided:
        return logits
    scale_of = scales.repeat_interleave(step.where.sum(1))
    is_guided = (scale_of != 0).nonzero().squeeze(1).to(logits.device)
    conditional, unconditional = logits[: len(scale_of)], logits[len(scale_of) :]
    scale_of = scale_of.to(logits.device, logits.dtype)[is_guided, None]
    guided = unconditional + (scale_of + 1) * (conditional[is_guided] - unconditional)
    return conditional.index_copy(0, is_guided, guided)


def _forward_plain(model: Model, canvas: Canvas, step: Step) -> Tensor:
    """Of a function of whole rows, which are fed to their end; those between the same columns go together."""
    for config in (canvas.configs[row] for row in step.rows.tolist()):
        require(
            config.cache is None and config.suffix_window is None,
            "sampling: cache and suffix_window need a network of ours, which takes a part of a row; leave them out for a "
            "plain function",
        )
    rows, device = step.rows, device_of(model) or canvas.device
    begin, end = attended_span(canvas.attended[rows])
    spans = torch.stack([begin, end, (canvas.cfg_scale[rows] != 0).long()], dim=1)
    counts = step.where.sum(1)
    row_of = torch.arange(len(rows)).repeat_interleave(counts)
    logits: Tensor | None = None
    for first, stop, guided in spans.unique(dim=0).tolist():
        same = (spans == torch.tensor([first, stop, guided])).all(1)
        here, columns = rows[same], slice(first, stop)
        scale = canvas.cfg_scale[here].repeat_interleave(counts[same])[:, None]
        out = guided_predict(
            model,
            canvas.tokens[here, columns].to(device),
            step.where[same, columns].to(device),
            canvas.prompt[here, columns].to(device),
            scale.to(device) if guided else 0.0,
            canvas.mask_id,
        )
        canvas.token_forwards[here] += (stop - first) * (1 + guided)
        if logits is None:
            logits = out.new_empty(len(row_of), out.shape[-1])
        logits[same[row_of].to(device)] = out
    assert logits is not None
    return logits
