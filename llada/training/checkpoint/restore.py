"""How a run begins: from its newest checkpoint that is whole, or else from the weights that it starts with.

A checkpoint that is damaged is named and passed over for the one before; another run's is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from llada.errors import UserError
from llada.model.initial import Rows, copy_full_
from llada.model.lora import init_adapters
from llada.model.transformer import Transformer
from llada.training.checkpoint.checksums import find_fault
from llada.training.checkpoint.folder import (
    STATE_FILE,
    begun_checkpoints,
    checkpoint_url,
    complete_checkpoints,
)
from llada.training.checkpoint.state import Cursor, DamagedError, read_state
from llada.training.checkpoint.tensors import read_tensors
from llada.training.events import CheckpointSkipped
from llada.training.parallel import from_all, world

log = logging.getLogger(__name__)


def restore(
    folder: str,
    identity: Mapping[str, Any],
    model: Transformer,
    optimizers: list[torch.optim.Optimizer],
    *,
    initial_state: Mapping[str, Rows] | None,
    seed: int,
    before: int | None = None,
) -> tuple[Cursor, list[CheckpointSkipped]]:
    """Fill the network (and optimizers) from the newest checkpoint that is whole, or else the initial weights, or else
    the seed; the cursor, and which newer checkpoints are not whole. A collective.

    Args:
        identity: JSON values of what must not change when a run goes on, by the name of what it is.
        initial_state: our parameter names -> full tensors, in memory or in a file, the same on every worker. Frozen
            parameters are filled from it in any case: checkpoints do not hold them.
        before: the checkpoints of this step and later ones are of no use.

    Raises:
        UserError: the checkpoints are another run's, or do not fit the network and its optimizers; or all are damaged.
    """
    is_adapted = not all(p.requires_grad for p in model.parameters())
    if is_adapted:
        assert initial_state is not None
        _copy_weights(model, initial_state, frozen=True)
    complete = complete_checkpoints(folder)
    skipped = [
        CheckpointSkipped(step, f"{checkpoint_url(folder, step)} has no {STATE_FILE} (an interrupted write)")
        for step in begun_checkpoints(folder)
        if step not in complete
    ]
    complete = [step for step in complete if before is None or step < before]
    for step in reversed(complete):
        try:
            state = read_state(folder, step)
            stored = state.pop("identity")
            different = sorted(
                key for key in identity.keys() | stored.keys() if stored.get(key) != identity.get(key)
            )
            if different:
                raise UserError(
                    f"the checkpoints in {folder} are of another run ({', '.join(different)} differ): "
                    "choose another output folder"
                )
            if fault := next(filter(None, from_all(find_fault(folder, step, state.pop("files", {})))), None):
                raise DamagedError(fault)
            read_tensors(folder, step, model, optimizers)
        except DamagedError as error:
            skipped.append(CheckpointSkipped(step, str(error)))
        else:
            skipped = [skip for skip in skipped if skip.step > step]
            _warn(skipped, f"going on from step {step}")
            return Cursor(**state), skipped
    if complete:
        raise UserError(
            f"no checkpoint in {folder} is whole ({skipped[-1].reason}): delete that folder to train from the start"
        )
    _warn(skipped, "training from the start")
    if is_adapted:
        init_adapters(model, seed)
    elif initial_state is None:
        model.init_weights(seed)
    else:
        _copy_weights(model, initial_state, frozen=False)
    return Cursor(), skipped


@torch.no_grad()
def _copy_weights(model: Transformer, state: Mapping[str, Rows], *, frozen: bool) -> None:
    """Fill either the frozen parameters or the others."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != frozen:
            copy_full_(parameter, state[name])


def _warn(skipped: list[CheckpointSkipped], consequence: str) -> None:
    for skip in skipped if world()[0] == 0 else []:
        log.warning("%s: %s", skip.reason, consequence)
