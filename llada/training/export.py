"""A trained network, sharded over the workers, becomes a checkpoint folder that `llada.load` reads.

No worker holds it whole: tensor by tensor is gathered, and worker 0 writes each safetensors file (5 GiB at most) as soon as
it has its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llada.model.hf import describe_weights, plan_files, write_weights
from llada.model.transformer import ModelConfig
from llada.training.parallel import from_all, full_tensor, world


def export_weights(
    url: str,
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    end_ids: Sequence[int] = (),
) -> None:
    """Write the weights into the folder `url`, config.json last. A collective.

    Args:
        weights: our parameter names -> this worker's shards.
        dtype: of the written tensors.
        end_ids: see `llada.model.hf.save_state`.

    Raises what kept worker 0 from writing, and a RuntimeError on the others.
    """
    is_writer = world()[0] == 0
    files = plan_files(config, "ours", dict.fromkeys(weights, dtype.itemsize))
    for number in range(len(files) + 1):
        fault = None
        gathered = {}
        for theirs, ours in files[number].names.items() if number < len(files) else ():
            gathered[theirs] = full_tensor(weights[ours].detach().to(dtype), wanted=is_writer)
        try:
            if is_writer and number < len(files):
                write_weights(files[number], url, gathered)
            elif is_writer:
                describe_weights(files, url, config, dtype, end_ids=end_ids)
        except Exception as error:
            fault = error
        if any(from_all(fault is not None)):
            raise fault or RuntimeError(f"worker 0 could not write the weights into {url}")
