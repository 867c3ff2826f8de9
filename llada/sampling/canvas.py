"""The canvas: tokens being denoised, cut into blocks, and how far each row has come.

A row works on one block at a time, the first that holds a mask; blocks are counted from where the text starts, and masks
in the prompt belong to the first. The steps are shared out among the blocks that hold masks, in each row for itself, so
that a row is denoised alike in any company.

Shape legend: B rows, L columns, K blocks.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from llada.diffusion.noise import stream_key
from llada.errors import UserError
from llada.sampling.config import SamplingConfig
from llada.sampling.rules import Rule, find_rule


class Canvas:
    """Rows that are denoised with the same settings. `sampler.plan` and `sampler.commit` change it in place."""

    def __init__(
        self,
        tokens: Tensor,
        config: SamplingConfig,
        *,
        mask_id: int,
        start: int,
        eos_id: int | None = None,
        attention_mask: Tensor | None = None,
        seed: int | Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            tokens: (B, L) int64 with the masks in place; copied.
            start: the first column of the text: blocks begin there, and only from there on EOS ends a row.
            eos_id: once this id is committed, everything right of it becomes EOS and is never denoised. None: no end.
            attention_mask: (B, L), 0 on padding.
            seed: an int seeds row i with seed + i, a sequence gives each row its own, None is random.

        Raises:
            UserError: the padding is the mask token, which would be filled; another number of seeds than rows.
        """
        self.config, self.mask_id, self.start, self.eos_id = config, mask_id, start, eos_id
        self.rule: Rule = find_rule(config)
        self.tokens = tokens.clone()
        self.attention_mask = attention_mask
        masks = tokens == mask_id
        if attention_mask is not None and bool((masks & (attention_mask == 0)).any()):
            raise UserError(
                f"sampling: the padding must not be the mask token {mask_id}, which would be filled"
            )
        self.prompt = ~masks  # (B, L) bool: given tokens and padding, what classifier-free guidance hides
        B, L = tokens.shape
        # (L,) counted from where the text starts: the same whatever padding stands before it.
        self.position = torch.arange(L, device=tokens.device) - start
        # A block longer than the row is the row; Python's integers may be wider than the tensor's.
        self.block_of = self.position.clamp(min=0) // min(config.block_length, max(1, L))  # (L,)
        masks_in = torch.zeros(
            B, int(self.block_of[-1]) + 1 if L else 0, dtype=torch.int64, device=tokens.device
        )
        masks_in.index_add_(1, self.block_of, masks.long())
        self.steps_of = share_steps(masks_in, config.steps)  # (B, K)
        self.seed_keys = torch.tensor(_seed_keys(seed, B), dtype=torch.int64, device=tokens.device)  # (B,)
        # (B, L): at which step of its block a position is due, where the rule decides that beforehand.
        self.due = self.rule.due_steps(self) if self.rule.due_steps else None

        self.block = torch.full((B,), -1, device=tokens.device)  # the one that each row works on
        self.block_masks = torch.zeros_like(self.block)  # its masks when the row came to it
        self.step = torch.zeros_like(self.block)  # forwards of the row in it
        self.forwards = torch.zeros_like(self.block)  # of the row so far: what its noise is drawn for
        self.reveal_step = torch.full_like(tokens, -1)  # (B, L): forward of the canvas that committed a token
        self.nfe = 0  # forwards so far; a batch counts once, guidance's doubled batch too
        self.token_forwards = 0  # tokens fed to the network so far, guidance's copies included


def share_steps(masks_in: Tensor, steps: int | None) -> Tensor:
    """(B, K) steps of each block from its masks (B, K): as equal as they can be among a row's blocks that hold masks,
    the first ones longer, at least one. None gives a block as many as it holds masks."""
    if steps is None:
        return masks_in
    has_masks = masks_in > 0
    blocks = has_masks.sum(1, keepdim=True).clamp(min=1)
    place = has_masks.cumsum(1) - 1
    return (steps // blocks + (place < steps % blocks)).clamp(min=1) * has_masks


def prompt_canvas(
    prompt: Tensor | Sequence[Sequence[int]],
    config: SamplingConfig,
    *,
    mask_id: int,
    eos_id: int | None = None,
    attention_mask: Tensor | None = None,
    suffix: Sequence[int] = (),
    seed: int | Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> Canvas:
    """Prompt + `config.gen_length` masks + suffix.

    Args:
        prompt: (B, P) int64, left-padded where `attention_mask` (B, P) is 0; or lists of ids of any lengths, which are
            left-padded here (right padding would change the rotary distances).
    """
    if isinstance(prompt, Tensor):
        rows = prompt if prompt.dim() == 2 else prompt[None]
    elif attention_mask is not None:
        raise UserError("generate: attention_mask goes with a tensor prompt; lists are padded here")
    else:
        rows, attention_mask = left_pad(prompt, pad_id=int(mask_id == 0))  # any id but the mask
    rows = rows.to(device or rows.device)
    B, P = rows.shape
    behind = torch.tensor([mask_id] * config.gen_length + list(suffix), dtype=torch.int64, device=rows.device)
    if attention_mask is not None:
        attention_mask = torch.nn.functional.pad(
            attention_mask.to(rows.device).reshape(B, P), (0, len(behind)), value=1
        )
    return Canvas(
        torch.cat([rows, behind.expand(B, -1)], dim=1),
        config,
        mask_id=mask_id,
        start=P,
        eos_id=eos_id,
        attention_mask=attention_mask,
        seed=seed,
    )


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(ids (B, P) int64 with `pad_id` on the left, attention mask (B, P), 0 on the padding)."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], dtype=torch.int64)
    attended = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.int64)
    return ids.reshape(len(rows), width), attended.reshape(len(rows), width)


def row_seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    """The seed of each row: seed + row, or those of the sequence."""
    if isinstance(seed, int | numbers.Integral):
        return [int(seed) + row for row in range(rows)]
    return [int(row_seed) for row_seed in seed]


def _seed_keys(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """The noise key of each row."""
    if seed is None:
        return [int(key) for key in torch.randint(2**62, (rows,))]
    seeds = row_seeds(seed, rows)
    if len(seeds) != rows:
        raise UserError(f"sampling: {len(seeds)} seeds for {rows} rows; give one for each row")
    return [stream_key(seed, "sampling") for seed in seeds]
