"""The one denoising loop, turned inside out: `plan` says which positions want logits, the caller runs the forward,
`commit` writes tokens.

    while (step := plan(canvas)) is not None:
        commit(canvas, step, forward(model, canvas, step))

`generate`, `infill`, the engine and batch inference differ in who calls the network, and for how many canvases at once: a
cache is a way to run the forward, as is what a block-causal network keeps of finished blocks, logits of several canvases from
one forward go to each canvas' own `commit`, and tokens that must not stand at a position have their logits at −∞ before it.
LLaDA's reverse process is generate.py of ML-GSAI/LLaDA; remasking="ancestral" is MDLM's sampler, which skips the forwards
that would change nothing.

Kept at every step: the mask token is never produced, a committed token never changes (but in the block at work, with a rule
that may remask: rules.py), nothing is committed after the first EOS, a forward is only run when it can commit something, and
logits that are no numbers end the run. At the end, what had been committed behind the EOS before it came is EOS too. No
loop over rows, and a fixed number of device syncs per step.

Rows are independent: noise belongs to a row's seed, its forward and the position; positions count from a row's first
token; and what differs by no more than rounding (`_ROUNDING`) is equal, the lowest position and the lowest id coming first. So
a row gets in float32 what it would get alone. In bfloat16, kernels that round by the shape of their matrices decide between
tokens that are nearly equally likely, unless `batch_invariant` gives all products one shape
(tests/benchmarks/batch_invariance.py: how often they do, and what that costs).

Shape legend: B rows, b rows at work, P prompt columns, G generated columns, L = P + G, N candidates, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llada.diffusion.noise import row_keys, stream_key, uniforms_of
from llada.errors import UserError
from llada.model.predict import Model
from llada.sampling.candidates import Candidates
from llada.sampling.canvas import Canvas, Step
from llada.sampling.coins import NEVER, spread
from llada.sampling.constraints import Constraints
from llada.sampling.draw import Cut, draw_tokens
from llada.sampling.forward import forward
from llada.sampling.prefixes import PrefixStore

_SUM, _SHIFT = stream_key(0, "sum"), stream_key(0, "shift of sums")
# How far apart equal logits may come out of two float32 forwards that differ in shape, per unit of their size. Less
# precise logits are not spared: what they leave undecided is decided by them, and only exact equals are equal.
_ROUNDING = 16 * torch.finfo(torch.float32).eps


def plan(canvas: Canvas) -> Step | None:
    """The positions of each row's current block that may be committed now, and those that were, where the rule weighs them
    again. None when no mask is left: the texts are then closed behind their first EOS.

    Until then it changes nothing but the rows' notes of the block they work on: planning twice gives the same step.
    """
    masks = (canvas.tokens == canvas.mask_id) & canvas.attended
    block = torch.where(masks, canvas.block_of, NEVER).amin(1) if masks.shape[1] else canvas.block
    in_block = canvas.block_of == block[:, None]
    where = masks & in_block
    is_new = block != canvas.block
    if bool(is_new.any()):
        # A hole in the prompt belongs to the first block, which otherwise begins with the text.
        begin, end = _reach(in_block & canvas.attended & (masks | (canvas.position >= 0)))
        canvas.block_begin = torch.where(is_new, begin, canvas.block_begin)
        canvas.block_end = torch.where(is_new, end, canvas.block_end)
        canvas.block_masks = torch.where(is_new, where.sum(1), canvas.block_masks)
        canvas.step = canvas.step.masked_fill(is_new, 0)
        canvas.block = block
    if where.shape[1]:
        due = canvas.due.masked_fill(~where, NEVER)
        where = where & (due == due.amin(1, keepdim=True))
    if bool(canvas.weighs_committed.any()):
        held = in_block & ~masks & ~canvas.prompt & where.any(1, keepdim=True)
        before_end = torch.arange(where.shape[1]) < canvas.first_end(canvas.is_end(canvas.tokens))
        where = where | (held & before_end & canvas.weighs_committed[:, None])
    rows = where.any(1).nonzero().squeeze(1)
    if not len(rows):
        canvas.close_texts()
        return None
    return Step(rows, where[rows])


def _reach(marks: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) and (B,): the first marked column of (B, L), and the one behind the last."""
    if not marks.shape[1]:
        return torch.zeros(len(marks), dtype=torch.int64), torch.zeros(len(marks), dtype=torch.int64)
    values = marks.to(torch.int8)
    return values.argmax(1), marks.shape[1] - values.flip(1).argmax(1)


def commit(canvas: Canvas, step: Step, logits: Tensor) -> None:
    """Draw tokens at the step's positions from `logits` (N, V), and write those that the rules choose. The logits may be
    changed in place.

    Raises FloatingPointError, before anything is written, when the logits of a position are not finite (single ids may be
    at −∞).
    """
    rows, where = step
    row, column = where.nonzero(as_tuple=True)
    canvas_row = rows[row]
    slot = where.cumsum(1)[row, column] - 1
    position = canvas.position[canvas_row, column]
    keys = row_keys(row_keys(canvas.seed_keys[rows], canvas.forwards[rows])[row], position)
    rounding = (_ROUNDING * (1 + 2 * canvas.cfg_scale[rows]))[row]
    logits = _writable(canvas, logits, canvas_row, position)
    if not bool(logits.amax(-1).isfinite().all()):
        _blame_constraints(canvas, logits, canvas_row, position)
        raise FloatingPointError(
            f"the network's logits are not finite (NaN or infinite) in forward {canvas.nfe} of {tuple(where.shape)} tokens: "
            "its weights are damaged, or the precision does not hold them"
        )
    present = canvas.tokens[canvas_row, column]
    is_held = present != canvas.mask_id
    drawn = draw_tokens(
        logits,
        canvas.temperature[canvas_row].masked_fill(is_held, 0.0),
        keys,
        rounding,
        cut=Cut(canvas.top_k[canvas_row], canvas.top_p[canvas_row], canvas.min_p[canvas_row]),
        uniform=_strata(canvas, rows, row, keys),
    )
    tokens = torch.where(is_held, present, drawn.cpu())
    own = logits.gather(1, tokens.to(logits.device)[:, None]).squeeze(1).cpu()
    unsure = canvas.unsure_ids[canvas_row]
    block = canvas.block[rows]
    everything = Candidates(
        logits=logits,
        tokens=tokens,
        is_held=is_held,
        row=row,
        slot=slot,
        column=column,
        shape=(len(rows), int(slot.max()) + 1),
        step=canvas.step[rows],
        steps=canvas.steps_of[rows, block],
        quota=_quota(canvas, rows),
        knobs=canvas.knobs[rows],
        noise_keys=keys,
        doubt=rounding * (1 + own.abs()),
        unsure_ids=unsure if bool((unsure != canvas.mask_id).any()) else None,
    )
    rules = [canvas.rules[r] for r in rows.tolist()]
    chosen = torch.zeros(everything.shape, dtype=torch.bool)
    for rule in dict.fromkeys(rules):
        own_rows = torch.tensor([other is rule for other in rules])
        candidates = everything if bool(own_rows.all()) else everything.of_rows(own_rows)
        chosen[own_rows, : candidates.shape[1]] = rule.choose(candidates) & candidates.exists
    chosen[:, 0] |= ~chosen.any(1)
    # When the steps left are no more than the blocks left, each block has to be done in one.
    is_last = canvas.steps[rows] - canvas.forwards[rows] <= canvas.blocks_left[rows, block]
    chosen |= everything.exists & is_last[:, None]
    is_chosen = chosen[row, slot]
    committed, dropped = torch.zeros_like(where), torch.zeros_like(where)
    committed[row, column] = is_chosen & ~is_held
    dropped[row, column] = is_held & ~is_chosen
    written = canvas.tokens[rows].masked_scatter(committed, tokens[is_chosen & ~is_held])
    columns = torch.arange(where.shape[1])
    ends = (written[:, :, None] == canvas.end_ids[rows][:, None]).any(-1) & committed
    first_end = torch.where(ends & (columns >= canvas.start[rows, None]), columns, NEVER).amin(1)
    committed &= columns <= first_end[:, None]
    is_open = (canvas.tokens[rows] == canvas.mask_id) & (columns > first_end[:, None])
    written = torch.where(is_open, canvas.end_ids[rows, :1], written)
    canvas.tokens[rows] = written
    canvas.reveal_step[rows] = torch.where(committed, canvas.forwards[rows, None], canvas.reveal_step[rows])
    _remask(canvas, rows, committed, dropped, first_end)
    canvas.shorten(rows, first_end)
    canvas.step[rows] += 1
    canvas.forwards[rows] += 1
    canvas.nfe += 1


def _strata(canvas: Canvas, rows: Tensor, row: Tensor, keys: Tensor) -> Tensor | None:
    """(N,) what the tokens of stratified rows are drawn with, NaN for the others'; None: there is no such row."""
    if not bool(canvas.stratified[rows].any()):
        return None
    shift = uniforms_of(row_keys(row_keys(_SHIFT, canvas.seed_keys[rows]), canvas.forwards[rows]))
    uniform = spread(uniforms_of(row_keys(_SUM, keys)), row, shift)
    return uniform.masked_fill(~canvas.stratified[rows][row], torch.nan)


def _remask(canvas: Canvas, rows: Tensor, committed: Tensor, dropped: Tensor, end: Tensor) -> None:
    """Make masks of the tokens `dropped` (b, L) by a rule that weighs them, and of those that were due to become masks
    before the next forward of their rows (b,): where some are to come back, there are masks then. `committed` (b, L) has come
    now; what stands from the columns `end` (b,) on is settled."""
    if not any(canvas.rules[r].may_remask for r in rows.tolist()):
        return
    is_settled = torch.arange(committed.shape[1]) >= end[:, None]
    back = dropped & ~is_settled
    again, due = canvas.again[rows], canvas.due[rows]
    kinds = [canvas.rules[r].due_again for r in rows.tolist()]
    for kind in dict.fromkeys(kinds):
        if kind is not None:
            new = committed & torch.tensor([other is kind for other in kinds])[:, None]
            lost, found = kind(canvas, rows, new)
            again.masked_scatter_(new, lost)
            due.masked_scatter_(new, found)
    again.masked_fill_(is_settled, NEVER)
    masks = canvas.tokens[rows] == canvas.mask_id
    in_block = canvas.block_of[rows] == canvas.block[rows, None]
    following = torch.where(in_block & (masks | (again < NEVER)), due, NEVER).amin(1, keepdim=True)
    back |= again < following
    canvas.due[rows], canvas.again[rows] = due, again.masked_fill(back, NEVER)
    canvas.tokens[rows] = canvas.tokens[rows].masked_fill(back, canvas.mask_id)
    canvas.reveal_step[rows] = canvas.reveal_step[rows].masked_fill(back, -1)


def _writable(canvas: Canvas, logits: Tensor, row: Tensor, position: Tensor) -> Tensor:
    """The logits (N, V) in at least float32, at −∞ for what must not stand at the positions (N,) of the rows (N,)."""
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    logits = logits.scatter_(1, canvas.never_ids[row].to(logits.device), -torch.inf)
    too_early = position < canvas.open_until[row]
    if bool(too_early.any()):
        ends = canvas.end_ids[row]
        ends = torch.where(too_early[:, None] & (ends >= 0), ends, canvas.mask_id)
        logits = logits.scatter_(1, ends.to(logits.device), -torch.inf)
    for constraints, which in _constrained(canvas, row):
        constraints.rule_out(logits, which, position[which])
    return logits


def _constrained(canvas: Canvas, row: Tensor) -> Iterator[tuple[Constraints, Tensor]]:
    """Constraints, and which of the candidates (N,) in the rows (N,) they are about."""
    if not any(canvas.constraints):
        return
    for constraints in dict.fromkeys(canvas.constraints):
        if constraints is not None:
            rows = torch.tensor([other is constraints for other in canvas.constraints])
            yield constraints, rows[row].nonzero().squeeze(1)


def _blame_constraints(canvas: Canvas, logits: Tensor, row: Tensor, position: Tensor) -> None:
    """Raise UserError when the settings, and not the network, leave nothing at a position."""
    for _, which in _constrained(canvas, row):
        empty = (logits[which.to(logits.device)] == -torch.inf).all(1).cpu()
        if bool(empty.any()):
            place = int(position[which][empty][0])
            raise UserError(
                f"sampling: allowed and forbidden leave no token for position {place} of the text"
            )


def _quota(canvas: Canvas, rows: Tensor) -> Tensor:
    """(b,) masks to commit: masks // steps, and one more in the first masks % steps of a block's (LLaDA generate.py)."""
    masks = canvas.block_masks[rows]
    steps = canvas.steps_of[rows, canvas.block[rows]].clamp(max=masks)
    return masks // steps + (canvas.step[rows] < masks % steps)


def advance(
    model: Model,
    canvas: Canvas,
    step: Step,
    prefixes: PrefixStore | None = None,
    *,
    batch_invariant: bool = False,
) -> None:
    """The forward of a step and what it commits. Raises as `commit` does; the step may then be tried again."""
    commit(canvas, step, forward(model, canvas, step, prefixes, batch_invariant=batch_invariant))


def denoise(model: Model, canvas: Canvas, *, batch_invariant: bool = False) -> Iterator[Canvas]:
    """Walk the canvas to its end, yielding it (changed in place) after every forward."""
    prefixes = PrefixStore()
    while (step := plan(canvas)) is not None:
        advance(model, canvas, step, prefixes, batch_invariant=batch_invariant)
        yield canvas
