"""Groups of gloo workers: `python gloo_workers.py FOLDER SOURCE` runs the jobs in FOLDER/jobs.pickle, by the number of
workers and their names. All are forks of one process, which has imported what they need."""

import multiprocessing
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, sys.argv[2])

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

# These two are imported by a training that begins.
import llada.training.checkpoint.restore
import llada.training.checkpoint.save  # noqa: F401
from llada.diffusion.batch import MicroBatch
from llada.diffusion.objective import objective_loss
from llada.model.transformer import ModelConfig
from llada.training.events import Event
from llada.training.export import export_weights
from llada.training.optim import ShardedMuon
from llada.training.parallel import begin_micro_batch, build_parallel, full_state
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


def run_gradients(model: ModelConfig, micro: MicroBatch) -> list[float]:
    """What of the gradients this worker holds behind each of two micro-batches, in shares of the parameters."""
    network = build_parallel(model, torch.device("cpu"), torch.float32)
    network.init_weights(0)
    held = []
    for is_last in (False, True):
        begin_micro_batch(network, is_last=is_last)
        objective_loss(network, micro).backward()
        grads = [p.grad.to_local().numel() for p in network.parameters() if p.grad is not None]
        held.append(sum(grads) / sum(p.numel() for p in network.parameters()))
    return held


def work(rank: int, num_workers: int, folder: Path, jobs: dict[str, dict[str, Any]]) -> None:
    store = f"file://{folder}/store-{num_workers}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_workers)
    answers: dict[str, Any] = {}
    for name, job in jobs.items():
        if "weights" in job or "micro" in job:
            answers[name] = (run_muon if "weights" in job else run_gradients)(**job)
            continue
        if "asked" in job:  # which worker is asked to leave, in each step
            job["should_stop"] = iter(job.pop("asked")[rank]).__next__
        events: list[Event] = []
        try:
            export = job.pop("export", None)
            result = train(**job, report=events.append)
            if export is not None:
                export_weights(export, dict(result.model.named_parameters()), job["model_config"])
            answers[name] = (replace(result, model=None), events, full_state(result.model))
        except Exception as error:
            answers[name] = repr(error)
    if rank == 0:
        torch.save(answers, folder / f"answers-{num_workers}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    for num_workers, jobs in pickle.loads((folder / "jobs.pickle").read_bytes()).items():
        ranks = range(num_workers)
        group = [fork.Process(target=work, args=(rank, num_workers, folder, jobs)) for rank in ranks]
        for process in group:
            process.start()
        for process in group:
            process.join()
        assert [process.exitcode for process in group] == [0] * num_workers


if __name__ == "__main__":
    main()
