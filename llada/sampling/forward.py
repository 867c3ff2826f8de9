"""The forward of a step: logits at the planned positions of each row, guidance applied, whatever rows go together.

A network of ours gets the rows that are at work laid end to end, of each the columns that its cache mode chooses
(cache.py, packed.py), or those that are not finished, of a block-causal one (blocks.py). Any function of (tokens) gets
whole rows, those between the same columns together, and knows no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llada.model.predict import (
    Model,
    check_restores_masks,
    device_of,
    guided_predict,
    network_block,
    takes_packed_rows,
)
from llada.model.transformer import Transformer
from llada.sampling.blocks import settled_columns
from llada.sampling.cache import KeyValues, Refresh, Stretch, View, choose_columns
from llada.sampling.canvas import Canvas, Step, attended_span
from llada.sampling.config import SamplingConfig
from llada.sampling.packed import Fed, packed_forward
from llada.sampling.prefixes import Prefix, PrefixStore
from llada.settings import require


@torch.no_grad()
def forward(
    model: Model,
    canvas: Canvas,
    step: Step,
    prefixes: PrefixStore | None = None,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """Logits (N, V) at the step's positions, in row-major order, guidance applied; counts the tokens that it feeds.

    `prefixes` are those that rows with `shared_depth` find again; whoever runs many rows keeps them from step to step. They
    change what it costs and nothing else. With `batch_invariant` a row's logits are bit for bit those of the row alone, in any
    precision; without it up to rounding, which decides between tokens that are nearly equally likely.

    Raises UserError for a setting that the model cannot heed (`check_network`, `check_invariance`).
    """
    check_invariance(model, batch_invariant)
    for row in step.rows.tolist():
        check_network(model, canvas.configs[row])
    if takes_packed_rows(model):
        prefixes = PrefixStore() if prefixes is None else prefixes
        return _forward_packed(model, canvas, step, prefixes, batch_invariant)
    return _forward_plain(model, canvas, step)


def check_network(model: Model, config: SamplingConfig) -> None:
    """Raise UserError when the model restores no masks, or takes no part of a row and is asked to."""
    check_restores_masks(model)
    require(
        takes_packed_rows(model)
        or (config.cache is None and config.suffix_window is None and not config.shared_depth),
        "sampling: cache, suffix_window and shared_depth need a network of ours, which takes a part of a row; leave them "
        "out for a plain function and a network with a shift",
    )


def check_invariance(model: Model, batch_invariant: bool) -> None:
    """Raise UserError when it is asked for and the products of the model are not ours to shape."""
    require(
        not batch_invariant or takes_packed_rows(model),
        "sampling: batch_invariant needs a network of ours, whose products it shapes; leave it out for a plain function "
        "and a network with a shift",
    )


class Feeding(NamedTuple):
    """What the next forward does for a row at work, in columns."""

    length: int
    """Of the whole row, when it is longest."""
    seen: Stretch
    """May be seen."""
    columns: Stretch
    """Are fed."""
    refresh: Refresh | None
    """What of them runs; None: all."""
    prompt: int
    """So many tokens of the row stand before the first that was not given."""


def columns_to_feed(canvas: Canvas, step: Step) -> list[Feeding]:
    """For each row at work."""
    notes = (
        canvas.first,
        canvas.stop,
        canvas.limit,
        canvas.block,
        canvas.block_begin,
        canvas.block_end,
        canvas.step,
        canvas.forwards,
    )
    response = canvas.prompt.logical_not().to(torch.int8).argmax(1)
    table = torch.stack([response, *notes])[:, step.rows].T.tolist()
    chosen = []
    for row, (written, first, stop, limit, number, begin, end, in_block, forwards) in zip(
        step.rows.tolist(), table, strict=True
    ):
        config, cache, length = canvas.configs[row], canvas.caches[row], limit - first
        if canvas.network_block is not None:
            stretches = settled_columns(Stretch(first, stop), number, canvas.network_block, cache)
            chosen.append(Feeding(length, *stretches, None, written - first))
            continue
        if config.suffix_window is not None:
            stop = min(stop, end + config.suffix_window)
        block = Stretch(begin, min(end, stop))
        view = View(Stretch(first, stop), block, written, in_block, forwards, config)
        chosen.append(Feeding(length, view.row, *choose_columns(view, cache), written - first))
    return chosen


class _Copy(NamedTuple):
    """What is fed of a row; with guidance a second one without its prompt."""

    fed: Fed
    place: int
    """Of the row among those at work."""
    begin: int
    """The canvas' column of the first token."""
    is_hidden: bool
    """Is the prompt hidden?"""


def _find_prefix(
    model: Transformer, canvas: Canvas, row: int, feeding: Feeding, prefixes: PrefixStore
) -> tuple[Prefix | None, int]:
    """What the row shares with others of what is fed; and the tokens that had to be fed for that."""
    config, first = canvas.configs[row], feeding.seen.begin
    layers = model.config.num_layers
    depth, length = int(config.shared_depth * layers), feeding.prompt
    if config.shared_prefix is not None:
        length = min(length, config.shared_prefix)
    if depth == 0 or feeding.columns.begin >= first + length:
        return None, 0
    behind = min(config.gen_length, int(canvas.attended[row].sum()) - length)
    ids = torch.full((length + behind,), canvas.mask_id)
    ids[:length] = canvas.tokens[row, first : first + length]
    prefix, run = prefixes.get(model, ids, length, depth)
    return prefix, -(-run * depth // layers)


def _forward_packed(
    model: Transformer, canvas: Canvas, step: Step, prefixes: PrefixStore, batch_invariant: bool
) -> Tensor:
    assert canvas.network_block == network_block(model), "the canvas was laid out for another network"
    rows, is_guided = step.rows.tolist(), (canvas.cfg_scale[step.rows] != 0).tolist()
    copies: list[_Copy] = []
    costs = []
    layers = model.config.num_layers
    feedings = columns_to_feed(canvas, step)
    for place, (row, feeding) in enumerate(zip(rows, feedings, strict=True)):
        config, cache, both, cost = canvas.configs[row], canvas.caches[row], 1 + is_guided[place], 0
        length, seen, columns, refresh, _ = feeding
        prefix: Prefix | None = None
        stores: Sequence[KeyValues | None] = (None, None)
        if config.cache is not None or canvas.network_block is not None:
            stores = cache.stores_for(length, both)
        if config.shared_depth:
            prefix, cost = _find_prefix(model, canvas, row, feeding, prefixes)
            if config.cache is None:
                stores = (*cache.stores_for(length, 1), None)
        count, begin, visible = columns.end - columns.begin, columns.begin - seen.begin, seen.end - seen.begin
        for hidden in range(both):
            # The copy without a prompt has none to share.
            fed = Fed(count, begin, visible, stores[hidden], refresh, None if hidden else prefix)
            copies.append(_Copy(fed, place, columns.begin, hidden == 1))
            cost += fed.num_run(layers)
        costs.append(cost)
    copies.sort(key=lambda copy: copy.fed.shape)
    logits = _run(model, canvas, step, copies, batch_invariant)
    canvas.token_forwards[step.rows] += torch.tensor(costs)
    for row, feeding in zip(rows, feedings, strict=True):
        cache = canvas.caches[row]
        cache.end = max(cache.end, feeding.columns.end)
        if canvas.network_block is not None:
            length = feeding.seen.end - feeding.seen.begin
            cache.settled = (length - 1) // canvas.network_block * canvas.network_block
    if not any(is_guided):
        return logits
    scales = canvas.cfg_scale[step.rows].repeat_interleave(step.where.sum(1))
    guided = (scales != 0).nonzero().squeeze(1).to(logits.device)
    conditional, unconditional = logits[: len(scales)], logits[len(scales) :]
    scales = scales.to(logits.device, logits.dtype)[guided, None]
    together = unconditional + (scales + 1) * (conditional[guided] - unconditional)
    return conditional.index_copy(0, guided, together)


def _run(
    model: Transformer, canvas: Canvas, step: Step, copies: Sequence[_Copy], batch_invariant: bool
) -> Tensor:
    """Logits at the step's positions, and behind them those of the copies without a prompt."""
    width, rows = canvas.tokens.shape[1], step.rows.tolist()
    places, positions = [], []
    # Where the column 0 of a row would stand among the tokens, for both copies.
    origins: list[list[int]] = [[0] * len(rows), [0] * len(rows)]
    start = 0
    for fed, place, begin, is_hidden in copies:
        first = rows[place] * width + begin
        places.append(torch.arange(first, first + fed.count))
        positions.append(torch.arange(fed.begin, fed.begin + fed.count))
        origins[is_hidden][place] = start - begin
        start += fed.count
    at = torch.cat(places)
    tokens = canvas.tokens.reshape(-1)[at]
    of_row, column = step.where.nonzero(as_tuple=True)
    origin = torch.tensor(origins)
    logits_at = origin[0, of_row] + column
    if len(copies) > len(rows):
        is_copy = torch.cat([torch.full((copy.fed.count,), copy.is_hidden) for copy in copies])
        tokens = tokens.masked_fill(is_copy & canvas.prompt.reshape(-1)[at], canvas.mask_id)
        guided = (canvas.cfg_scale[step.rows] != 0)[of_row]
        logits_at = torch.cat([logits_at, origin[1, of_row[guided]] + column[guided]])
    return packed_forward(
        model,
        [copy.fed for copy in copies],
        tokens,
        torch.cat(positions),
        logits_at,
        batch_invariant=batch_invariant,
    )


def _forward_plain(model: Model, canvas: Canvas, step: Step) -> Tensor:
    """Of a function of whole rows, which are fed to their end, or as far as they have grown; those between the same columns
    go together."""
    rows, device = step.rows, device_of(model) or canvas.device
    begin, end = attended_span(canvas.attended[rows])
    may_grow = torch.tensor([canvas.configs[row].initial_length is not None for row in rows.tolist()])
    end = torch.where(may_grow, canvas.stop[rows], end)
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
            scale.to(device, torch.float32) if guided else 0.0,
            canvas.mask_id,
        )
        canvas.token_forwards[here] += (stop - first) * (1 + guided)
        if logits is None:
            logits = out.new_empty(len(row_of), out.shape[-1])
        logits[same[row_of].to(device)] = out.to(logits.dtype)
    assert logits is not None
    return logits
