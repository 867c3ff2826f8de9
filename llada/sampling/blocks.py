"""The blocks of a row: how steps are shared out among them, and what a block-causal network has to say about them.

Such a network attends to a position's own block and the earlier ones (`ModelConfig.block_length`): the canvas has the same
blocks, masks behind the one at work are never fed, and a finished block's keys and values are kept exactly, so that no
setting switches it on or off. A prompt goes through the network once, with the first block of the text.

Shape legend: B rows, K blocks.
"""

from __future__ import annotations

from torch import Tensor

from llada.sampling.cache import RowCache, Stretch
from llada.sampling.config import SamplingConfig
from llada.settings import require


def share_steps(masks_in: Tensor, steps: int | None) -> Tensor:
    """(B, K) steps of each block from its masks (B, K): as equal as they can be among a row's blocks that hold masks,
    the first ones longer. None gives a block as many as it holds masks. Raises UserError for fewer steps than such blocks."""
    if steps is None:
        return masks_in
    has_masks = masks_in > 0
    blocks = has_masks.sum(1, keepdim=True)
    check_steps(steps, int(blocks.max()) if len(blocks) else 0)
    place = has_masks.cumsum(1) - 1
    blocks = blocks.clamp(min=1)
    return (steps // blocks + (place < steps % blocks)) * has_masks


def check_steps(steps: int | None, blocks: int) -> None:
    """Refuse fewer steps than there are `blocks` that hold masks. Raises UserError."""
    require(
        steps is None or steps >= blocks,
        f"sampling: steps={steps} is too few for {blocks} blocks that hold masks, of which each takes a step: set steps to "
        f"at least {blocks}, or make the blocks longer (block_length)",
    )


def count_blocks(config: SamplingConfig, start: int, network_block: int | None) -> int:
    """How many blocks hold masks when a text begins at column `start` of a row; a fixed position is none."""
    first = 0 if network_block is None else start
    fixed = config.fixed or {}
    return len({(first + i) // config.block_length for i in range(config.gen_length) if i not in fixed})


def check_network_block(config: SamplingConfig, network_block: int | None) -> None:
    """Refuse what means nothing to a block-causal network, whose blocks are of this length. Raises UserError."""
    if network_block is None:
        return
    require(
        config.block_length == network_block,
        f"sampling: block_length={config.block_length}, but the network attends in blocks of {network_block}: set "
        f"block_length={network_block}",
    )
    unset_names = {"cache": None, "suffix_window": None, "shared_depth": 0.0, "initial_length": None}
    for name, unset in unset_names.items():
        require(
            getattr(config, name) == unset,
            f"sampling: {name}={getattr(config, name)!r} means nothing to a block-causal network, which sees nothing behind a "
            "block and keeps what is before it exactly: leave it out",
        )


def settled_columns(row: Stretch, block: int, network_block: int, cache: RowCache) -> tuple[Stretch, Stretch]:
    """Of a block-causal network: the columns that may be seen, and those of them to feed, when a row works on this block.

    All up to the block's end are seen. The first forward of a block feeds also the one before it, which was fed last while
    it still had masks: so a finished block costs its tokens once more, and no forward of its own.
    """
    end = min(row.begin + (block + 1) * network_block, row.end)
    return Stretch(row.begin, end), Stretch(row.begin + cache.settled, end)
