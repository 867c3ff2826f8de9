"""The memory that `llada plan` counts, against the peak of real training steps.

    python tests/benchmarks/plan_memory.py [--quick]

A step (forward and backward of its micro-batches, clipping, the optimizer) runs on the CPU under torch's profiler, which sees
each allocation and release; its highest sum, with the weights and moments that were there before, is the peak to the byte. It
is no matter of the machine or of its load. The counted one is the fullest moment of `step_memory`, validation apart, with as
many predicted positions as the fullest micro-batch had. Writes plan_memory.json; --quick takes a few of the cases.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.profiler import ProfilerActivity, profile

from llada.diffusion.batch import Batch
from llada.diffusion.objective import ObjectiveConfig, corrupt
from llada.model.transformer import ModelConfig
from llada.training.batches import StepBatch, cut_evenly
from llada.training.memory import Worker, step_memory
from llada.training.optim import OptimConfig, build_optimizers, step_all
from llada.training.parallel import Recomputed, build_parallel, clip_gradients
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
    """A step of `micro_batches` × `rows` rows."""

    network: str
    dtype: torch.dtype
    recomputed: Recomputed = "none"
    micro_batches: int = 1
    rows: int = 2
    length: int = 256
    document_mask: bool = True
    optim: OptimConfig = OptimConfig()

    @property
    def run(self) -> RunConfig:
        kind = "masked_diffusion" if NETWORKS[self.network].block_length is None else "block_diffusion"
        return RunConfig(
            ObjectiveConfig(kind=kind, document_mask=self.document_mask),
            self.optim,
            TrainConfig(
                global_batch_tokens=self.micro_batches * self.rows * self.length,
                micro_batch_rows=self.rows,
                activation_checkpointing=self.recomputed,
            ),
        )


def cases() -> Iterator[Case]:
    precisions = (torch.float32, torch.bfloat16)
    for name, dtype in itertools.product(NETWORKS, precisions):
        for recomputed, number in itertools.product(("none", "selective", "full"), (1, 2)):
            yield Case(name, dtype, recomputed, number)
        yield Case(name, dtype, document_mask=False)
        yield Case(name, dtype, rows=4, length=512)
    for optim in (OptimConfig(optimizer="muon"), OptimConfig(moments="bf16")):
        for dtype in precisions:
            yield Case("deep", dtype, "full", 2, optim=optim)


def measure(case: Case) -> dict[str, Any]:
    """The peak of a step, measured and counted, in bytes."""
    model, run = NETWORKS[case.network], case.run
    net = build_parallel(model, torch.device("cpu"), case.dtype, recomputed=case.recomputed)
    net.init_weights(0)
    optimizers = build_optimizers(net, run.optim)
    batch = step_batch(case)

    def step() -> None:
        train_step(net, batch, 1, case.dtype)
        clip_gradients(net, run.optim.grad_clip)
        step_all(optimizers, torch.zeros(()))

    step()  # which makes the moments
    slots = [slot for each in optimizers for state in each.state.values() for slot in state.values()]
    there = sum(tensor.numel() * tensor.element_size() for tensor in [*net.parameters(), *slots])
    measured = there + peak_of(step)
    predicted = max(len(micro.positions) for micro in batch.micro) / (case.rows * case.length)
    worker = Worker(dtype=case.dtype, device="cpu")
    counted = next(
        memory
        for memory in step_memory(model, run, worker, row_length=case.length, predicted=predicted)
        if memory.moment != "validation"
    )
    return {
        "measured_bytes": measured,
        "counted_bytes": round(counted.total),
        "error": counted.total / measured - 1,
        "moment": counted.moment,
    }


def step_batch(case: Case) -> StepBatch:
    """Random rows of four documents each, noised."""
    n, model = case.rows * case.micro_batches, NETWORKS[case.network]
    generator = torch.Generator().manual_seed(0)
    segments = (torch.arange(case.length) // (case.length // 4)).int().repeat(n, 1)
    batch = Batch(
        tokens=torch.randint(2, model.vocab_size, (n, case.length), generator=generator),
        segment_ids=segments if case.document_mask else None,
        maskable=torch.ones(n, case.length, dtype=torch.bool),
        slots=torch.arange(n),
        epochs=torch.zeros(n, dtype=torch.int64),
        sample_ids=torch.arange(n),
        step=0,
        global_rows=n,
        per_row=False,
    )
    micro = [
        corrupt(rows, case.run.objective, seed=0, mask_id=MASK, block_length=model.block_length)
        for rows in batch.split(cut_evenly(n, case.rows))
    ]
    return StepBatch(step=0, micro=micro, counted=torch.tensor(n * case.length), tokens=n * case.length)


def peak_of(run: Callable[[], None]) -> int:
    """The most bytes that are allocated at a time while it runs, on top of what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


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
    for case in itertools.islice(cases(), None, None, 20 if arguments.quick else 1):
        row = {**asdict(case), **measure(case)}
        row |= {"dtype": str(case.dtype).removeprefix("torch."), "optim": case.run.optim.optimizer}
        row["moments"] = case.optim.moments
        rows.append(row)
        print(
            f"{case.network:30} {row['dtype']:9} {case.recomputed:10} {case.micro_batches} × {case.rows} × {case.length}  "
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
