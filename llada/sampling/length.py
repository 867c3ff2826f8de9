"""How long a text becomes: a canvas that begins short and grows where the model has more to say (DAEDAL, arXiv 2508.00819).

With `initial_length` a row begins with so many masks. A forward that does not find the end of the text in the last of them is
followed by more masks, and commits nothing; the first one that does is also the first of the decoding. With `insert_below`
a mask of the block at work that the model has no idea of becomes several while the end is not certain, and what stands
behind it moves to the right; with a cache at the first forward of a block alone, which feeds the end of the canvas too.
What may still be added is laid out from the beginning, as EOS behind the canvas (`Canvas.stop`), which is neither fed nor
denoised: at most `gen_length` masks in all, and a text that has none left has come to its end.

How certain the end is: the mean over the last `eos_window` masks of the canvas, or over all if there are fewer, of the
probability of EOS where that is the likeliest token, and 0 elsewhere. Upstream looks for the last 32 positions with EOS
on the whole canvas, and divides by 32 even where it found fewer or the canvas is shorter. Once an EOS is committed, the length
is settled. Blocks are counted by position: what moves behind the end of a block belongs to the next one, and the block
is begun anew. `steps` are those of `gen_length` masks, and a shorter canvas takes its share; forwards that only lengthen
it come on top. Every one of them, and every insertion, adds at least one mask, so that there is an end to it.

Shape legend: B rows, b rows at work, L columns, N positions, K blocks, n rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from llada.sampling.draw import confidence, likeliest
from llada.sampling.rules import find_rule, highest
from llada.settings import require

if TYPE_CHECKING:
    from llada.sampling.canvas import Canvas, Step
    from llada.sampling.config import SamplingConfig

SETTLED, INSERTS, APPENDS = range(3)
"""What may still happen to a row's length: nothing; masks come in its midst; they come at its end, and then perhaps in its midst."""
OF_GROWING = ("expansion_length", "eos_window", "eos_threshold", "insert_below", "insert_eos_threshold")
"""The settings that mean something with `initial_length` alone."""
_OF_INSERTING = ("insert_eos_threshold",)


def check_length(config: SamplingConfig) -> None:
    """Raise UserError for settings of a growing canvas that would not be heeded, or do not go together."""
    if config.initial_length is None:
        _refuse(config, OF_GROWING, "without initial_length: leave it out, or set that too")
        return
    refused = "where the canvas grows: leave it out, or initial_length"
    _refuse(config, ("fixed", "suffix_window", "logits_eos_inf"), refused)
    for name in ("allowed", "forbidden"):
        positions = [position for position in getattr(config, name) or {} if position != "*"]
        require(not positions, f"sampling: {name} names a position, which means nothing {refused}")
    if config.insert_below is None:
        _refuse(config, _OF_INSERTING, "without insert_below: leave it out, or set that too")
        return
    require(
        config.steps is None,
        f"sampling: steps={config.steps!r} cannot be shared out where masks are put in later: leave it out, or insert_below",
    )
    rule = find_rule(config)
    require(
        rule.due_steps is None and not rule.may_remask,
        f"sampling: insert_below={config.insert_below!r} needs a rule that chooses among the masks of each step and takes "
        "nothing back: leave it out, or choose another rule",
    )


def idle_settings(config: SamplingConfig) -> tuple[str, ...]:
    """Those that mean nothing beside the others."""
    if config.initial_length is None:
        return OF_GROWING
    return _OF_INSERTING if config.insert_below is None else ()


def _refuse(config: SamplingConfig, names: tuple[str, ...], why: str) -> None:
    for name in names:
        value = getattr(config, name)
        default = type(config).__dataclass_fields__[name].default
        require(value == default, f"sampling: {name}={value!r} means nothing {why}")


def numbers_of(config: SamplingConfig) -> list[float]:
    """A row's settings, in the order of OF_GROWING; with an `insert_below` of 0 nothing is inserted."""
    if config.initial_length is None:
        return [0.0] * len(OF_GROWING)
    return [float(getattr(config, name) or 0) for name in OF_GROWING]


def hold_back(canvas: Canvas) -> None:
    """Let the rows of a new canvas begin with `initial_length` masks: those behind become EOS that is not fed.

    Raises UserError where it is unknown how a text ends, or something given stands behind the masks.
    """
    config = canvas.configs[0] if len(canvas) else None
    if config is None or config.initial_length is None:
        return
    setting = f"sampling: initial_length={config.initial_length}"
    require(
        bool((canvas.end_ids >= 0).all()),
        f"{setting} needs the id of EOS, by which a text is seen to come to its end: pass eos_id=…",
    )
    columns = torch.arange(canvas.tokens.shape[1])
    in_text = (canvas.tokens == canvas.mask_id) & canvas.attended & (canvas.position >= 0)
    begin = canvas.limit - in_text.sum(1)
    require(
        bool((in_text == ((columns >= begin[:, None]) & (columns < canvas.limit[:, None]))).all()),
        f"{setting} is for masks behind a prompt, and here something given stands behind or between them: leave it out",
    )
    canvas.stop = torch.minimum(begin + config.initial_length, canvas.limit)
    held = (columns >= canvas.stop[:, None]) & (columns < canvas.limit[:, None])
    canvas.tokens = torch.where(held, canvas.end_ids[:, :1], canvas.tokens)
    canvas.growth = torch.where(canvas.stop < canvas.limit, APPENDS, SETTLED)


def last_masks(canvas: Canvas, masks: Tensor) -> Tensor | None:
    """(B, L) bool: the last of the `masks` (B, L), of the rows whose end is looked for at this forward; None: of none."""
    is_looking = canvas.growth == APPENDS
    if bool((canvas.growth == INSERTS).any()):
        sees_end = torch.tensor([config.cache is None for config in canvas.configs]) | (canvas.step == 0)
        is_looking = is_looking | ((canvas.growth == INSERTS) & sees_end)
    if not bool(is_looking.any()):
        return None
    window = canvas.length_numbers[:, 1:2]
    masks = masks & (canvas.position >= 0) & is_looking[:, None]
    return masks & (masks.flip(1).cumsum(1).flip(1) <= window)


class Look(NamedTuple):
    """What a forward says about the lengths of the rows at work."""

    rows: Tensor
    """(b,): the rows of the canvas."""
    is_short: Tensor
    """(b,) bool: more masks go to the end, and nothing is committed."""
    doubt: Tensor
    """(b, L): for each mask in whose place several may come, how little the model knows of it: 1 − its highest probability; −∞
    elsewhere."""
    slack: Tensor
    """(b, L): doubts so near to each other are equal but for rounding."""


def look(canvas: Canvas, step: Step, logits: Tensor, rounding: Tensor) -> Look:
    """What the `logits` (N, V) at a step's positions say. `rounding` (N,) as in `likeliest`. Changes nothing."""
    assert step.candidates is not None
    rows, shape = step.rows, step.where.shape
    row, column = step.where.nonzero(as_tuple=True)
    tokens = likeliest(logits, logits.amax(1, keepdim=True), rounding).cpu()
    own = logits.gather(1, tokens.to(logits.device)[:, None]).squeeze(1).cpu().double()
    highest_probs = confidence(logits, tokens).cpu()
    is_end = (tokens[:, None] == canvas.end_ids[rows[row]]).any(1)
    probs, ends = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    slack = torch.zeros(shape, dtype=torch.float64)
    probs[row, column] = highest_probs
    ends[row, column] = highest_probs * is_end
    slack[row, column] = highest_probs * (1 - highest_probs) * rounding * (1 + own.abs())
    last = last_masks(canvas, (canvas.tokens == canvas.mask_id) & canvas.attended)
    assert last is not None
    last = last[rows]
    certainty = (ends * last).sum(1) / last.sum(1).clamp(min=1)
    _, _, threshold, below, insert_threshold = canvas.length_numbers[rows].unbind(1)
    is_short = (canvas.growth[rows] == APPENDS) & (certainty < threshold)
    may_insert = last.any(1) & ~is_short & (certainty < insert_threshold)
    place = step.candidates & (canvas.position[rows] >= 0) & (probs < below[:, None]) & may_insert[:, None]
    return Look(rows, is_short, (1 - probs).masked_fill(~place, -torch.inf), slack)


def grow(canvas: Canvas, look: Look) -> None:
    """Put in the masks that a forward has asked for, once it has committed what it does."""
    rows, is_short = look.rows, look.is_short
    columns = torch.arange(canvas.tokens.shape[1])
    has_ended = (canvas.first_end(canvas.is_end(canvas.tokens)).squeeze(1) < canvas.stop)[rows]
    is_place = (look.doubt > -torch.inf) & (canvas.tokens[rows] == canvas.mask_id) & ~has_ended[:, None]
    one = torch.ones_like(rows)
    place = highest(look.doubt.masked_fill(~is_place, -torch.inf), one, look.slack)
    has_place, room = place.any(1), canvas.limit[rows] - canvas.stop[rows]
    expansion = canvas.length_numbers[rows, 0].long()
    count = torch.where(is_short, expansion, torch.where(has_place, expansion - 1, 0)).minimum(room)
    behind = torch.where(is_short, canvas.stop[rows] - 1, place.to(torch.int8).argmax(1))

    grown = rows[count > 0]
    count_of, behind_of = count[count > 0, None], behind[count > 0, None]
    is_new = (columns > behind_of) & (columns <= behind_of + count_of)
    source = columns - count_of * (columns > behind_of + count_of)
    canvas.tokens[grown] = canvas.tokens[grown].gather(1, source).masked_fill(is_new, canvas.mask_id)
    canvas.reveal_step[grown] = canvas.reveal_step[grown].gather(1, source).masked_fill(is_new, -1)
    canvas.confidence[grown] = canvas.confidence[grown].gather(1, source).masked_fill(is_new, torch.nan)
    canvas.top_of[grown] = canvas.top_of[grown].gather(1, source).masked_fill(is_new, -1)
    canvas.stop[grown] += count_of.squeeze(1)
    canvas.block[grown] = -1  # begun anew: its masks are counted again, and a cache feeds everything
    canvas.blocks_left[grown] = _blocks_left(canvas, grown)
    canvas.forwards[rows] += is_short.long()
    canvas.steps[rows] += is_short.long()

    inserts = torch.where(canvas.length_numbers[rows, 3] > 0, INSERTS, SETTLED)
    growth = torch.where(is_short, APPENDS, torch.where(has_ended, SETTLED, inserts))
    canvas.growth[rows] = growth.masked_fill(canvas.stop[rows] == canvas.limit[rows], SETTLED)


def _blocks_left(canvas: Canvas, rows: Tensor) -> Tensor:
    """(n, K): the blocks from this one on that hold masks, or may."""
    columns = torch.arange(canvas.tokens.shape[1])
    is_held = (columns >= canvas.stop[rows, None]) & (columns < canvas.limit[rows, None])
    is_open = (canvas.tokens[rows] == canvas.mask_id) & canvas.attended[rows] | is_held
    open_in = torch.zeros_like(canvas.blocks_left[rows])
    open_in.scatter_add_(1, canvas.block_of[rows], is_open.long())
    return (open_in > 0).long().flip(1).cumsum(1).flip(1)
