"""The memory that `llada plan` counts, against the peak of real training steps, of fine-tuning and of validation.

    python tests/benchmarks/plan_memory.py [--quick]

A step (forward and backward of its micro-batches, clipping, the optimizer) runs on the CPU under torch's profiler, which sees
each allocation and release; its highest sum, with the weights and moments that were there before, is the peak to the byte. It
is no matter of the machine or of its load. The counted one is the fullest moment of `step_memory` with as many predicted
positions as the fullest micro-batch had; a validation's is its own.

Two workers are two processes here. What they send is released by a thread that the profiler does not see: memory counts as
released when something else lies there, which is late at times, so that a peak is the lowest of four steps.
Writes plan_memory.json; --quick takes a few of the cases.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.profiler import ProfilerActivity, profile

from llada.diffusion.batch import Batch
from llada.diffusion.likelihood import nelbo_rows
from llada.diffusion.noise import row_keys
from llada.diffusion.objective import ObjectiveConfig, corrupt
from llada.model.lora import LoraConfig
from llada.model.transformer import ModelConfig, Transformer
from llada.training.adamw import local_shard
from llada.training.batches import StepBatch, cut_evenly
from llada.training.memory import Worker, step_memory
from llada.training.optim import OptimConfig, build_optimizers, step_all
from llada.training.parallel import Recomputed, build_parallel, clip_gradients, evaluating
from llada.training.run import RunConfig, TrainConfig
from llada.training.trainer import train_step

HERE = Path(__file__).resolve().parent
MASK = 1


def network(**shape: Any) -> ModelConfig:
    given = {"d_model": 128, "num_heads": 4, "ffn_dim": 344, "max_length": 512, "mask_token_id": MASK}
    return ModelConfig(**(given | shape))


NETWORKS = {
    "wide vocabulary": network(vocab_size=8192, num_layers=2),
    "deep": network(vocab_size=512, num_layers=8),
    "grouped queries, wide SwiGLU": network(
        vocab_size=2048, d_model=256, num_layers=3, num_heads=8, num_kv_heads=2, ffn_dim=1024
    ),
    "tied": network(vocab_size=4096, d_model=192, num_layers=4, ffn_dim=512, tie_embeddings=True),
    "normed heads": network(vocab_size=1024, num_layers=4, qk_norm=True, qkv_bias=True),
    "blocks": network(vocab_size=1024, num_layers=4, block_length=32),
}


@dataclass(frozen=True)
class Case:
    """A step of `micro_batches` × `rows` rows on each worker."""

    network: str
    dtype: torch.dtype
    recomputed: Recomputed = "none"
    micro_batches: int = 1
    rows: int = 2
    length: int = 256
    document_mask: bool = True
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    workers: int = 1
    validated: bool = False
    """The rows are scored, not learned."""

    @property
    def run(self) -> RunConfig:
        kind = "masked_diffusion" if NETWORKS[self.network].block_length is None else "block_diffusion"
        return RunConfig(
            ObjectiveConfig(kind=kind, document_mask=self.document_mask),
            self.optim,
            TrainConfig(
                global_batch_tokens=self.workers * self.micro_batches * self.rows * self.length,
                micro_batch_rows=self.rows,
                activation_checkpointing=self.recomputed,
            ),
            self.lora,
        )


def cases() -> Iterator[Case]:
    precisions = (torch.float32, torch.bfloat16)
    for name, dtype in itertools.product(NETWORKS, precisions):
        for recomputed, number in itertools.product(get_args(Recomputed), (1, 2)):
            yield Case(name, dtype, recomputed, number)
        yield Case(name, dtype, document_mask=False)
        yield Case(name, dtype, rows=4, length=512)
        yield Case(name, dtype, validated=True)
    for optim in (OptimConfig(optimizer="muon"), OptimConfig(moments="bf16")):
        for dtype in precisions:
            yield Case("deep", dtype, "full", 2, optim=optim)
    few = LoraConfig(rank=8, targets=("q_proj", "v_proj"))
    for name, dtype in itertools.product(NETWORKS, precisions):
        for recomputed in get_args(Recomputed):
            yield Case(name, dtype, recomputed, lora=LoraConfig(rank=16))
        yield Case(name, dtype, micro_batches=2, lora=few)
    for name, dtype in itertools.product(NETWORKS, precisions):
        for number in (1, 2, 3):
            yield Case(name, dtype, "full", number, workers=2)
        yield Case(name, dtype, workers=2)
        yield Case(name, dtype, "selective", workers=2, lora=LoraConfig(rank=16))


def measure(case: Case) -> dict[str, Any]:
    """The peak of a step, measured and counted, in bytes. Of one of several workers: a collective."""
    model, run = NETWORKS[case.network], case.run
    cpu = torch.device("cpu")
    net = build_parallel(model, cpu, case.dtype, recomputed=case.recomputed, lora=case.lora)
    net.init_weights(0)
    optimizers = build_optimizers(net, run.optim)
    batch = step_batch(case)

    def step() -> None:
        if case.validated:
            with evaluating(net, cpu, case.dtype):
                score(net, case)
            return
        train_step(net, batch, case.workers, case.dtype)
        clip_gradients(net, run.optim.grad_clip)
        step_all(optimizers, torch.zeros(()))

    step()  # which makes the moments
    slots = [slot for each in optimizers for state in each.state.values() for slot in state.values()]
    there = sum(
        shard.numel() * shard.element_size() for shard in map(local_shard, [*net.parameters(), *slots])
    )
    if case.validated:  # a validation has moments beside it
        there += 8 * sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    measured = there + min(peak_of(step) for _ in range(1 if case.workers == 1 else 4))
    predicted = max(len(micro.positions) for micro in batch.micro) / (case.rows * case.length)
    predicted = 1.0 if case.validated else predicted
    worker = Worker(num_workers=case.workers, dtype=case.dtype, device="cpu")
    counted = next(
        memory
        for memory in step_memory(model, run, worker, row_length=case.length, predicted=predicted)
        if (memory.moment == "validation") == case.validated
    )
    return {
        "measured_bytes": measured,
        "counted_bytes": round(counted.total),
        "error": counted.total / measured - 1,
        "moment": counted.moment,
    }


def score(net: Transformer, case: Case) -> None:
    """As a validation does, with all masked."""
    batch = rows_of(case, case.rows)
    nelbo_rows(
        net,
        batch.tokens,
        batch.maskable,
        batch.maskable.sum(1),
        row_keys(0, batch.sample_ids),
        mask_id=MASK,
        segment_ids=batch.segment_ids,
    )


def measure_side_by_side(rank: int, side: list[Case], store: str, results: Any) -> None:
    """One of two workers, over cases of two workers."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for case in side:
        row = measure(case)
        if rank == 0:
            results.put(row)
    dist.barrier()
    dist.destroy_process_group()


def measure_all(some: list[Case]) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Each case with its row."""
    for case in some:
        if case.workers == 1:
            yield case, measure(case)
    side = [case for case in some if case.workers == 2]
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(measure_side_by_side, (side, f"{folder}/store", results), nprocs=2)
        for case in side:
            yield case, results.get()


def rows_of(case: Case, n: int) -> Batch:
    """Random rows of four documents each."""
    generator = torch.Generator().manual_seed(0)
    segments = (torch.arange(case.length) // (case.length // 4)).int().repeat(n, 1)
    return Batch(
        tokens=torch.randint(2, NETWORKS[case.network].vocab_size, (n, case.length), generator=generator),
        segment_ids=segments if case.document_mask else None,
        maskable=torch.ones(n, case.length, dtype=torch.bool),
        slots=torch.arange(n),
        epochs=torch.zeros(n, dtype=torch.int64),
        sample_ids=torch.arange(n),
        step=0,
        global_rows=n,
        per_row=False,
    )


def step_batch(case: Case) -> StepBatch:
    """The same, noised."""
    n, model = case.rows * case.micro_batches, NETWORKS[case.network]
    micro = [
        corrupt(rows, case.run.objective, seed=0, mask_id=MASK, block_length=model.block_length)
        for rows in rows_of(case, n).split(cut_evenly(n, case.rows))
    ]
    return StepBatch(step=0, micro=micro, counted=torch.tensor(n * case.length), tokens=n * case.length)


def peak_of(run: Callable[[], None]) -> int:
    """The most bytes that are allocated at a time while it runs, on top of what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    changes, events = [], list(profiled.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    begins: list[int] = []
    sizes: dict[int, int] = {}
    now = peak = 0
    for _, begin, size in sorted(changes, key=lambda change: change[0]):
        if size < 0 and begin in sizes:
            begins.remove(begin)
            now -= sizes.pop(begin)
        if size <= 0:
            continue
        at = bisect.bisect_left(begins, begin)
        at -= at > 0 and begins[at - 1] + sizes[begins[at - 1]] > begin
        while at < len(begins) and begins[at] < begin + size:  # was released elsewhere
            now -= sizes.pop(begins.pop(at))
        begins.insert(at, begin)
        sizes[begin] = size
        now += size
        peak = max(peak, now)
    return peak


def main() -> None:
    from sampling_model import machine

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    some = list(itertools.islice(cases(), None, None, 20 if arguments.quick else 1))
    for case, figures in measure_all(some):
        row = {**asdict(case), **figures}
        row |= {"dtype": str(case.dtype).removeprefix("torch."), "optim": case.run.optim.optimizer}
        row["moments"] = case.optim.moments
        rows.append(row)
        print(
            f"{case.network:30} {row['dtype']:9} {case.recomputed:10} {case.micro_batches} × {case.rows} × {case.length}  "
            f"{case.workers} {'validated' if case.validated else ''}{case.lora.rank or ''}  "
            f"{row['measured_bytes'] / 2**20:7.2f} MiB, counted {row['counted_bytes'] / 2**20:7.2f} ({row['error']:+.2%}, {row['moment']})"
        )
    errors = [abs(row["error"]) for row in rows]
    report = {
        "machine": machine(),
        "networks": {name: model.content() for name, model in NETWORKS.items()},
        "largest_error": max(errors),
        "median_error": statistics.median(errors),
        "steps": rows,
    }
    print(f"error: median {report['median_error']:.2%}, largest {report['largest_error']:.2%}")
    target = arguments.results / "plan_memory.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
