"""Memory and time of the head with its loss, forward and backward, at LLaDA's vocabulary.

    python tests/benchmarks/head_loss.py [--positions N] [--width D] [--vocabulary V] [--repeats N] [--threads N]

Contestants, each in a process of its own for every measurement:
    naive     all logits in float32, F.cross_entropy, autograd
    pieces    all logits, float32 and cross-entropy 4,096 positions at a time, autograd
    slices    llada.diffusion.cross_entropy.weighted_nats

Figures: the peak of the process' memory above what it had with the weights and inputs in place, and the CPU's seconds;
medians of the repeats. The gradients have to agree. Writes head_loss.json. --quick takes a small vocabulary, to see that it
runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from sampling_model import machine
from torch import Tensor

from llada.diffusion.cross_entropy import weighted_nats

HERE = Path(__file__).resolve().parent


def naive(x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    return (F.cross_entropy(x @ weight.T, targets, reduction="none") * scale).sum()


def pieces(x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    logits = (x @ weight.T).split(4096)
    nats = [
        F.cross_entropy(some, target, reduction="none")
        for some, target in zip(logits, targets.split(4096), strict=True)
    ]
    return (torch.cat(nats) * scale).sum()


CONTESTANTS = {"naive": naive, "pieces": pieces, "slices": weighted_nats}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_contestant(name: str, positions: int, width: int, vocabulary: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(positions, width, generator=generator, requires_grad=True)
    weight = (torch.randn(vocabulary, width, generator=generator) * width**-0.5).requires_grad_()
    targets = torch.randint(0, vocabulary, (positions,), generator=generator)
    scale = torch.rand(positions, generator=generator)
    F.linear(x[:8], weight[:8]).sum().backward()  # the libraries are loaded
    x.grad = weight.grad = None
    before, began = peak_bytes(), time.process_time()
    loss = CONTESTANTS[name](x, weight, targets, scale)
    loss.backward()
    seconds, peak = time.process_time() - began, peak_bytes() - before
    assert x.grad is not None
    assert weight.grad is not None
    return {
        "peak_bytes": peak,
        "cpu_s": seconds,
        "loss": float(loss),
        "norms": [float(x.grad.double().norm()), float(weight.grad.double().norm())],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=126_464)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--contestant", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.positions, arguments.vocabulary, arguments.repeats = 256, 4096, 1
    shape = [arguments.positions, arguments.width, arguments.vocabulary, arguments.threads]
    if arguments.contestant:
        print(json.dumps(run_contestant(arguments.contestant, *shape)))
        return
    report: dict[str, Any] = {
        "machine": machine(),
        "settings": dict(zip(("positions", "width", "vocabulary", "threads"), shape, strict=True))
        | {"repeats": arguments.repeats, "dtype": "float32"},
        "results": {},
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    for repeat in range(arguments.repeats):
        for name in list(CONTESTANTS)[:: 1 if repeat % 2 == 0 else -1]:
            command = [sys.executable, __file__, *sys.argv[1:], "--contestant", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    reference = runs["naive"][0]
    for name, own in runs.items():
        for key in ("loss", "norms"):
            torch.testing.assert_close(
                torch.tensor(own[0][key]), torch.tensor(reference[key]), rtol=1e-4, atol=0.0
            )
        report["results"][name] = {
            key: statistics.median(run[key] for run in own) for key in ("peak_bytes", "cpu_s")
        } | {"cpu_s_range": [min(run["cpu_s"] for run in own), max(run["cpu_s"] for run in own)]}
    for name, row in report["results"].items():
        for key in ("peak_bytes", "cpu_s"):
            row[f"{key}_of_naive"] = row[key] / report["results"]["naive"][key]
        print(
            f"{name:8} peak {row['peak_bytes'] / 2**20:8,.0f} MiB ({row['peak_bytes_of_naive']:.2f})"
            f"  {row['cpu_s']:6.2f} s of CPU ({row['cpu_s_of_naive']:.2f})"
        )
    report["machine"]["load_after"] = os.getloadavg()[0]
    target = arguments.results / "head_loss.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
