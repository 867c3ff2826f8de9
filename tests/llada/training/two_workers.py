"""One of two gloo workers: `python two_workers.py RANK FOLDER SOURCE` runs the jobs in FOLDER/jobs.pickle."""

import pickle
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, sys.argv[3])

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from llada.training.events import Event
from llada.training.optim import ShardedMuon
from llada.training.trainer import train


def run_muon(
    weights: list[torch.Tensor], grads: list[list[torch.Tensor]], **knobs: Any
) -> list[torch.Tensor]:
    """Matrices sharded by rows over both workers, moved by ShardedMuon with given gradients."""
    mesh = init_device_mesh("cpu", (2,))
    params = [torch.nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])) for w in weights]
    optimizer = ShardedMuon(params, **knobs)
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = distribute_tensor(grad, mesh, [Shard(0)])
        optimizer.step()
    return [param.detach().full_tensor() for param in params]


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    answers: dict[str, Any] = {}
    for name, job in pickle.loads((folder / "jobs.pickle").read_bytes()).items():
        if "weights" in job:
            answers[name] = run_muon(**job)
            continue
        events: list[Event] = []
        try:
            answers[name] = (train(**job, report=events.append), events)
        except Exception as error:
            answers[name] = repr(error)
    if rank == 0:
        torch.save(answers, folder / "answers.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
