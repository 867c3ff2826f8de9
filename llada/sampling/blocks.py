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
    the first ones longer, at least one. None gives a block as many as it holds masks."""
    if steps is None:
        return masks_in
    has_masks = masks_in > 0
    blocks = has_masks.sum(1, keepdim=True).clamp(min=1)
    place = has_masks.cumsum(1) - 1
    return (steps // blocks + (place < steps % blocks)).clamp(min=1) * has_masks


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
