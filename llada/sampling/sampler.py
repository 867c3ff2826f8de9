"""The one denoising loop, turned inside out: `plan` says which positions want logits, the caller runs the forward,
`commit` writes tokens.

    while (step := plan(canvas)) is not None:
        commit(canvas, step, forward(model, canvas, step))

`generate`, `infill`, the engine and batch inference differ in who calls the network, and for which rows at once.
How the forward is run is not this file's: a cache (cache.py), shared prefixes (prefixes.py) and what is kept of a
block-causal network's finished blocks (blocks.py) change what is fed, not what is planned. Logits of several canvases
from one forward go to each canvas' own `commit`. LLaDA's reverse process is generate.py of ML-GSAI/LLaDA;
remasking="ancestral" is MDLM's sampler, which skips the forwards that would change nothing.

Kept at every step, whatever the rule: neither the mask token nor what is forbidden at a position is written; given
tokens stay; nothing is committed behind the first EOS; a row takes no more forwards than its steps, or one for each
block with masks; logits that are no numbers end the run. Whether a committed token stays is the rule's to say
(`Rule.may_remask`): with most it does, and no forward is in vain; with ReMDM's and P2's it does once its block is done.
At the end, what had been committed behind the EOS before it came is EOS too. No loop over rows that calls anything, and a
fixed number of device syncs per step.

Rows are independent: noise belongs to a row's seed, its forward and the position; positions count from a row's first
token; and what differs by no more than rounding (`_ROUNDING`) is equal, the lowest position and the lowest id coming
first. So a row gets in float32 what it would get alone, in any company. In bfloat16 that is no promise without
`batch_invariant`, which gives all products one shape: kernels may round by the shape of what they are given, which
decides between tokens that are nearly equally likely. How often is a matter of the machine and the network;
tests/benchmarks/batch_invariance.py counts it, and what the switch costs.

Shape legend: B rows, b rows at work, L columns, N candidates, V vocabulary rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from llada.diffusion.noise import row_keys, stream_key, uniforms_of
from llada.errors import UserError
from llada.model.predict import Model
from llada.sampling import length
from llada.sampling.candidates import Candidates
from llada.sampling.canvas import Canvas, Step
from llada.sampling.coins import NEVER, spread
from llada.sampling.constraints import Constraints
from llada.sampling.draw import Cut, draw_tokens, likeliest
from llada.sampling.forward import forward
from llada.sampling.prefixes import PrefixStore
from llada.sampling.trace import record

_SUM, _SHIFT, _SLOT = stream_key(0, "sum"), stream_key(0, "shift of sums"), stream_key(0, "slot")
# How far apart equal logits may come out of two float32 forwards that differ in shape, per unit of their size. Less
# precise logits are not spared: what they leave undecided is decided by them, and only exact equals are equal.
_ROUNDING = 16 * torch.finfo(torch.float32).eps


def plan(canvas: Canvas) -> Step | None:
    """The positions of each row's current block that may be committed now, and those that were, where the rule weighs them
    again. None when no mask is left: the texts are then closed behind their first EOS.

    Until then it changes nothing but the rows' notes of the block they work on: planning twice gives the same step.
    """
    tokens, block_of = canvas.tokens.numpy(), canvas.block_of.numpy()
    masks = (tokens == canvas.mask_id) & canvas.attended.numpy()
    present = canvas.block.numpy()
    block = np.where(masks, block_of, NEVER).min(1, initial=NEVER)
    in_block = block_of == block[:, None]
    where = masks & in_block
    is_new = block != present
    if is_new.any() and tokens.size:
        # A hole in the prompt belongs to the first block, which otherwise begins with the text.
        reach = (in_block & canvas.attended.numpy() & (masks | (canvas.position.numpy() >= 0)))[is_new]
        canvas.block_begin.numpy()[is_new] = reach.argmax(1)
        canvas.block_end.numpy()[is_new] = reach.shape[1] - reach[:, ::-1].argmax(1)
        canvas.block_masks.numpy()[is_new] = where[is_new].sum(1)
        canvas.step.numpy()[is_new] = 0
        present[is_new] = block[is_new]
    if not where.any():
        canvas.close_texts()
        return None
    if canvas.uses.dues:
        due = np.where(where, canvas.due.numpy(), NEVER)
        where &= due == due.min(1, initial=NEVER, keepdims=True)
    if canvas.uses.committed:
        held = in_block & ~masks & ~canvas.prompt.numpy() & where.any(1, keepdims=True)
        before_end = np.arange(where.shape[1]) < canvas.first_end(canvas.is_end(canvas.tokens)).numpy()
        where |= held & before_end & canvas.weighs_committed.numpy()[:, None]
    (rows,) = where.any(1).nonzero()
    at_work, candidates = torch.from_numpy(rows), torch.from_numpy(where[rows])
    if canvas.uses.growth and (last := length.last_masks(canvas, torch.from_numpy(masks))) is not None:
        return Step(at_work, candidates | last[at_work], candidates)
    return Step(at_work, candidates)


def commit(canvas: Canvas, step: Step, logits: Tensor) -> None:
    """Draw tokens at the step's positions from `logits` (N, V), and write those that the rules choose; a text that is too
    short gets more masks (length.py). The logits may be changed in place.

    Raises FloatingPointError, before anything is written, when the logits of a position are not finite (single ids may be
    at −∞).
    """
    if step.candidates is None:
        _unmask(canvas, step, logits)
    else:
        row, column = step.where.nonzero(as_tuple=True)
        canvas_row = step.rows[row]
        logits = _writable(canvas, logits, canvas_row, canvas.position[canvas_row, column])
        _check_numbers(canvas, step, logits)
        look = length.look(canvas, step, logits, _rounding(canvas, canvas_row))
        is_kept = (step.candidates & ~look.is_short[:, None])[row, column]
        if bool(is_kept.any()):
            rows, where = step.rows[~look.is_short], step.candidates[~look.is_short]
            _unmask(canvas, Step(rows, where), logits[is_kept.to(logits.device)])
        length.grow(canvas, look)
    canvas.nfe += 1


def _rounding(canvas: Canvas, row: Tensor) -> Tensor:
    """(N,): how far apart equal logits of the rows (N,) may come out, per unit of their size."""
    return _ROUNDING * (1 + 2 * canvas.cfg_scale[row])


def _check_numbers(canvas: Canvas, step: Step, logits: Tensor) -> Tensor:
    """The highest of each position's logits, (N, 1). Raises FloatingPointError, or UserError where the settings are to blame,
    for logits that leave nothing to write."""
    highest = logits.amax(1, keepdim=True)
    if bool(highest.isfinite().all()):
        return highest
    row, column = step.where.nonzero(as_tuple=True)
    row = step.rows[row]
    _blame_constraints(canvas, logits, row, canvas.position[row, column])
    raise FloatingPointError(
        f"the network's logits are not finite (NaN or infinite) in forward {canvas.nfe} of {tuple(step.where.shape)} tokens: "
        "its weights are damaged, or the precision does not hold them"
    )


def _unmask(canvas: Canvas, step: Step, logits: Tensor) -> None:
    """`commit`, but for the length of the rows.

    What is a few numbers a row is reckoned with NumPy, on the memory of the canvas: a call costs less than torch's there.
    """
    rows, where = step.rows.numpy(), step.where.numpy()
    row, column = where.nonzero()
    at = rows[row]  # (N,) the candidates' rows of the canvas, where `row` counts those at work
    slot = where.cumsum(1)[row, column] - 1
    of_row, canvas_row, position = map(torch.from_numpy, (row, at, canvas.position.numpy()[at, column]))

    @cache
    def keys() -> Tensor:
        """(N,) what a candidate's noise is a function of."""
        of_forward = row_keys(canvas.seed_keys[step.rows], canvas.forwards[step.rows])
        return row_keys(of_forward[of_row], position)

    rounding = _rounding(canvas, canvas_row)
    if canvas.uses.forced:
        # What a row is told it does not draw: as in LLaDA's likelihood, the mask is among what it might have been.
        forced = torch.from_numpy(canvas.forced.numpy()[at, column])
        told = (forced >= 0).to(logits.device)
        of_mask = logits[told, canvas.mask_id]
    logits = _writable(canvas, logits, canvas_row, position)
    if canvas.uses.forced:
        logits[told, canvas.mask_id] = of_mask.to(logits.dtype)
    highest = _check_numbers(canvas, step, logits)
    if not canvas.uses.temperature:
        tokens = likeliest(logits, highest, rounding)
    else:
        tokens = draw_tokens(
            logits,
            canvas.temperature[canvas_row],
            keys(),
            rounding,
            cut=Cut(canvas.top_k[canvas_row], canvas.top_p[canvas_row], canvas.min_p[canvas_row]),
            uniform=_strata(canvas, step.rows, of_row, keys),
        )
    present, tokens = torch.from_numpy(canvas.tokens.numpy()[at, column]), tokens.cpu()
    is_held = present != canvas.mask_id
    if canvas.uses.committed:
        tokens = torch.where(is_held, present, tokens)
    if canvas.uses.forced:
        tokens = torch.where(forced < 0, tokens, forced)
    own = logits.gather(1, tokens.to(logits.device)[:, None])
    block = canvas.block.numpy()[rows]
    candidates = Candidates(
        logits=logits,
        tokens=tokens,
        is_held=is_held,
        row=of_row,
        slot=torch.from_numpy(slot),
        column=torch.from_numpy(column),
        shape=(len(rows), int(slot.max()) + 1),
        step=torch.from_numpy(canvas.step.numpy()[rows]),
        steps=torch.from_numpy(canvas.steps_of.numpy()[rows, block]),
        quota=torch.from_numpy(_quota(canvas, rows, block)),
        knobs=torch.from_numpy(canvas.knobs.numpy()[rows]),
        draw_keys=keys,
        doubt=rounding * (1 + own.squeeze(1).abs().cpu()),
        unsure_ids=canvas.unsure_ids[canvas_row] if canvas.uses.unsure_ids else None,
    )
    is_chosen = _choose(canvas, rows, block, candidates)[row, slot]
    _write(canvas, rows, candidates, is_chosen)
    canvas.step.numpy()[rows] += 1
    canvas.forwards.numpy()[rows] += 1


def _choose(canvas: Canvas, rows: np.ndarray, block: np.ndarray, candidates: Candidates) -> np.ndarray:
    """(b, C) bool: what each row's rule chooses, one at least, and all where the steps are used up."""
    rules, exists = [canvas.rules[row] for row in rows.tolist()], candidates.exists
    if len(kinds := list(dict.fromkeys(rules))) == 1:
        chosen = kinds[0].choose(candidates).cpu().logical_and(exists).numpy()
    else:
        chosen = np.zeros(candidates.shape, dtype=bool)
        for rule in kinds:
            own = np.array([other is rule for other in rules])
            of_rule = candidates.of_rows(torch.from_numpy(own))
            chosen[own, : of_rule.shape[1]] = rule.choose(of_rule).cpu().logical_and(of_rule.exists).numpy()
    chosen[:, 0] |= ~chosen.any(1)
    # When the steps left are no more than the blocks left, each block has to be done in one.
    steps_left = canvas.steps.numpy()[rows] - canvas.forwards.numpy()[rows]
    is_last = steps_left <= canvas.blocks_left.numpy()[rows, block]
    return chosen | (exists.numpy() & is_last[:, None])


def _write(canvas: Canvas, rows: np.ndarray, candidates: Candidates, is_chosen: np.ndarray) -> None:
    """Write the candidates that are chosen (N,) bool, but what stands behind an end that is written; the masks there become
    EOS. Make masks of those that were held and are not chosen."""
    row, column, tokens = candidates.row.numpy(), candidates.column.numpy(), candidates.tokens.numpy()
    is_held = candidates.is_held.numpy()
    is_written, at = is_chosen & ~is_held, rows[row]
    ends = (tokens[:, None] == canvas.end_ids.numpy()[at]).any(1) & is_written
    first_end = np.full(len(rows), NEVER)
    if ends.any():
        ends &= column >= canvas.start.numpy()[at]
        np.minimum.at(first_end, row[ends], column[ends])
        is_written &= column <= first_end[row]
        own = canvas.tokens.numpy()
        is_open = (own[rows] == canvas.mask_id) & (np.arange(own.shape[1]) > first_end[:, None])
        own[rows] = np.where(is_open, canvas.end_ids.numpy()[rows, :1], own[rows])
        canvas.shorten(torch.from_numpy(rows), torch.from_numpy(first_end))
    written = at[is_written], column[is_written]
    canvas.tokens.numpy()[written] = tokens[is_written]
    canvas.reveal_step.numpy()[written] = canvas.forwards.numpy()[written[0]]
    if canvas.uses.trace:
        traced = torch.from_numpy((is_written & canvas.is_traced.numpy()[at]).nonzero()[0])
        logits = candidates.logits[traced.to(candidates.logits.device)]
        record(
            canvas, torch.from_numpy(at)[traced], candidates.column[traced], logits, candidates.tokens[traced]
        )
    if canvas.uses.remasking:
        committed, dropped = np.zeros((2, len(rows), canvas.tokens.shape[1]), dtype=bool)
        committed[row, column] = is_written
        dropped[row, column] = is_held & ~is_chosen
        _remask(canvas, *map(torch.from_numpy, (rows, committed, dropped, first_end)))


def _strata(canvas: Canvas, rows: Tensor, row: Tensor, keys: Callable[[], Tensor]) -> Tensor | None:
    """(N,) what the tokens of stratified rows are drawn with, NaN for the others'; None: there is no such row."""
    if not canvas.uses.strata:
        return None
    shift = uniforms_of(row_keys(row_keys(_SHIFT, canvas.seed_keys[rows]), canvas.forwards[rows]))
    uniform = spread(uniforms_of(row_keys(_SUM, keys())), row, shift)
    return uniform.masked_fill(~canvas.stratified[rows][row], torch.nan)


def _remask(canvas: Canvas, rows: Tensor, committed: Tensor, dropped: Tensor, end: Tensor) -> None:
    """Make masks of the tokens `dropped` (b, L) by a rule that weighs them, and of those that were due to become masks
    before the next forward of their rows (b,): where some are to come back, there are masks then. `committed` (b, L)
    has come now; what stands from the columns `end` (b,) on is settled."""
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
    canvas.confidence[rows] = canvas.confidence[rows].masked_fill(back, torch.nan)


def _writable(canvas: Canvas, logits: Tensor, row: Tensor, position: Tensor) -> Tensor:
    """The logits (N, V) in at least float32, at −∞ for what must not stand at the positions (N,) of the rows (N,)."""
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    logits = logits.scatter_(1, canvas.never_ids[row].to(logits.device), -torch.inf)
    if canvas.uses.open_until:
        too_early = position < canvas.open_until[row]
        ends = canvas.end_ids[row]
        ends = torch.where(too_early[:, None] & (ends >= 0), ends, canvas.mask_id)
        logits = logits.scatter_(1, ends.to(logits.device), -torch.inf)
    for constraints, which in _constrained(canvas, row):
        constraints.rule_out(logits, which, position[which])
    for r, slots in enumerate(canvas.slots):
        if slots is not None and len(which := (row == r).nonzero().squeeze(1)):
            of_forward = row_keys(row_keys(_SLOT, canvas.seed_keys[r]), canvas.forwards[r])
            slots.rule_out(
                logits,
                which,
                position[which],
                canvas.tokens[r, int(canvas.start[r]) :],
                mask_id=canvas.mask_id,
                temperature=float(canvas.temperature[r]),
                uniforms=uniforms_of(row_keys(of_forward, torch.arange(len(slots.slots)))).tolist(),
            )
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


def _quota(canvas: Canvas, rows: np.ndarray, block: np.ndarray) -> np.ndarray:
    """(b,) masks to commit: masks // steps, and one more in the first masks % steps of a block's (LLaDA generate.py)."""
    masks = canvas.block_masks.numpy()[rows]
    steps = np.minimum(canvas.steps_of.numpy()[rows, block], masks)
    return masks // steps + (canvas.step.numpy()[rows] < masks % steps)


def advance(
    model: Model,
    canvas: Canvas,
    step: Step,
    prefixes: PrefixStore | None = None,
    *,
    batch_invariant: bool = False,
    fail: Callable[[int, Exception], None] | None = None,
) -> list[int]:
    """The forward of a step and what it commits; the rows of the canvas that it has brought on.

    Where it fails, each row is tried alone, and `fail` is told of a row that fails alone. None: it raises as `commit`
    does, and the step may be tried again.
    """
    try:
        logits = forward(model, canvas, step, prefixes, batch_invariant=batch_invariant)
    except Exception as error:
        parts = _row_by_row(step, error, fail)
    else:
        return _commit_rows(canvas, step, logits, fail)
    # Behind the `except`, where the error is gone, and with it the memory of the forward that failed.
    again = [
        advance(model, canvas, one, prefixes, batch_invariant=batch_invariant, fail=fail) for one, _ in parts
    ]
    return [row for rows in again for row in rows]


def _commit_rows(
    canvas: Canvas, step: Step, logits: Tensor, fail: Callable[[int, Exception], None] | None
) -> list[int]:
    """The rows whose logits (N, V) could be committed. Where some are no numbers, or are all ruled out, or a rule fails on
    them, the others need no other forward, which may not give the same (cache.py)."""
    try:
        commit(canvas, step, logits)
    except Exception as error:  # before anything was written
        parts = _row_by_row(step, error, fail)
    else:
        return step.rows.tolist()
    return [row for one, own in parts for row in _commit_rows(canvas, one, logits[own], fail)]


def _row_by_row(
    step: Step, error: Exception, fail: Callable[[int, Exception], None] | None
) -> list[tuple[Step, slice]]:
    """A step for each row of one that has failed, and which of its logits belong to it; nothing for a row that was alone."""
    if fail is None:
        raise error
    if len(step.rows) == 1:
        fail(int(step.rows[0]), error)
        return []
    ends = step.where.sum(1).cumsum(0).tolist()
    return [
        (step.of(torch.tensor([row])), slice(begin, end))
        for row, (begin, end) in enumerate(itertools.pairwise([0, *ends]))
    ]


def denoise(model: Model, canvas: Canvas, *, batch_invariant: bool = False) -> Iterator[Canvas]:
    """Walk the canvas to its end, yielding it (changed in place) after every forward."""
    prefixes = PrefixStore()
    while (step := plan(canvas)) is not None:
        advance(model, canvas, step, prefixes, batch_invariant=batch_invariant)
        yield canvas
