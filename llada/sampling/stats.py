"""What an engine has done and has still to do, as numbers that a monitor shows and an autoscaler divides by.

The unit of work is the token-forward: one token fed to the network once. No torch here: the front process reads these too.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from llada.sampling.config import SamplingConfig

BLOCK_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper ends of the histogram of block latencies."""
_WEIGHT = 0.1  # of the newest reply in what is known of all


@dataclass
class EngineStats:
    """Sums since the engine's beginning; then what there is now."""

    forwards: int = 0
    """Of the network, each over as many rows as had their turn."""
    rows: int = 0
    """That these have brought on: rows / forwards is the mean occupancy of the batch."""
    tokens: int = 0
    """Fed to the network."""
    seconds: float = 0.0
    """Spent in forwards."""
    cache_refreshes: int = 0
    """Times that a row with a cache was fed as a whole."""
    cancelled_replies: int = 0
    """Begun, and then given up or failed."""
    cancelled_tokens: int = 0
    """Fed to the network for those."""
    blocks: list[int] = field(default_factory=lambda: [0] * (len(BLOCK_SECONDS) + 1))
    """Of so many blocks the latency, from the one before to its last token, fell between two of BLOCK_SECONDS."""
    block_seconds: float = 0.0
    """Of all blocks together."""

    replies: int = 0
    """Asked for and not complete."""
    rows_now: int = 0
    """Of these, on the canvas."""
    rows_most: int = 0
    """That it takes at a time."""
    cache_bytes: int = 0
    """Keys and values that the rows on the canvas may take."""
    work_left: float = 0.0
    """Token-forwards that the replies will probably still take."""

    def add_block(self, seconds: float) -> None:
        self.blocks[bisect_left(BLOCK_SECONDS, seconds)] += 1
        self.block_seconds += seconds


class Forecast:
    """How many token-forwards a reply takes: what its settings allow at the most, times the share of that which replies of
    late have taken. They end early, unmask several tokens at a time, and are fed in part."""

    def __init__(self) -> None:
        self.share = 1.0

    def expect(self, sampling: SamplingConfig, num_given: int) -> float:
        """For a reply that nothing was done for yet. `num_given`: tokens of its prompt and suffix."""
        return self.share * most_token_forwards(sampling, num_given)

    def learn(self, sampling: SamplingConfig, num_given: int, token_forwards: int) -> None:
        """A reply has ended, for which so much was done."""
        share = token_forwards / most_token_forwards(sampling, num_given)
        self.share += _WEIGHT * (min(share, 1.0) - self.share)


def most_token_forwards(sampling: SamplingConfig, num_given: int) -> int:
    """All steps, each over the whole canvas, twice where guidance runs it twice."""
    steps = sampling.gen_length if sampling.steps is None else sampling.steps
    return steps * (num_given + sampling.gen_length) * (1 + (sampling.cfg_scale != 0))
