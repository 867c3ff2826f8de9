"""A training step of this repository beside the plain way, in turns in one process; and the peak memory of each.

    python tests/benchmarks/training.py [--turns N] [--steps N] [--width D] [--layers N] [--rows N] [--threads N]
                                        [--profile FOLDER] [--quick]

plain     transformers' LlamaForCausalLM of the same shape under a 4-D mask that lets everybody see everything, logits at all
          positions, noise and loss as in LLaDA's GUIDELINES, clipping, torch's fused AdamW
ours      rows of a prepared folder through `BatchStream`, then what `train` does with each batch: `train_step`,
          `clip_gradients`, `step_all`
compiled  ours with `train.compile`

All learn rows of the same folder, t uniform in [0, 1], from the same weights; first their losses and gradients on the same
masks have to agree. Settings: vocabularies of 4k and 32k, float32 and bf16 (autocast in both; the plain way's residual
stream is then of float32, ours of bf16).

Figures: tokens per second of CPU time (all threads, ours with the one that reads and masks ahead), the median of the turns;
of the ratio, taken turn by turn, the median and the range; the memory of each in a process of its own, above what that had
with the libraries loaded: weights, gradients and moments (`state_bytes`) included. --profile writes what one step of each
spends its time on. Writes training.json. --quick takes a tiny network, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from sampling_model import machine
from torch import Tensor

from llada.data.tokens.manifest import write_index
from llada.data.tokens.packing import PackedRows
from llada.data.tokens.shards import TokenDataset, write_shard
from llada.diffusion.objective import ObjectiveConfig, add_noise
from llada.model.hf import tensor_names
from llada.model.transformer import ModelConfig
from llada.training.batches import BatchStream
from llada.training.optim import OptimConfig, build_optimizers, step_all
from llada.training.parallel import autocast, build_parallel, clip_gradients
from llada.training.trainer import train_step

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
VOCABULARIES = (4096, 32_768)
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
EPS = 1e-3  # of GUIDELINES' forward process
OPTIM = OptimConfig()


@dataclass(frozen=True)
class Setting:
    """What both are given."""

    vocabulary: int
    dtype: str
    width: int
    layers: int
    rows: int
    """Of a step, which is one micro-batch."""
    row_length: int
    threads: int

    def write_data(self, folder: Path) -> TokenDataset:
        return write_data(folder, self.model, 64 * self.rows, self.row_length)

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.vocabulary,
            d_model=self.width,
            num_layers=self.layers,
            num_heads=self.width // 64,
            ffn_dim=self.width * 11 // 4,
            max_length=self.row_length,
            mask_token_id=1,
            eos_token_id=0,
            pad_token_id=0,
        )


def write_data(
    folder: Path, model: ModelConfig, rows: int, row_length: int, documents: int = 1
) -> TokenDataset:
    """A prepared folder of random tokens, of which nothing can be learned: only the shape counts. In each row so many
    documents of one length."""
    random = np.random.default_rng(0)
    ends = np.linspace(0, row_length, documents + 1).astype(np.uint32)
    packed = PackedRows(
        random.integers(2, model.vocab_size - 1, (rows, row_length), dtype=np.uint32),
        np.tile(np.stack([ends[:-1], ends[:-1], ends[1:]], axis=1), (rows, 1)),
        np.arange(rows + 1, dtype=np.uint64) * documents,
    )
    entry = write_shard(str(folder), "train", "0", packed)
    write_index(f"{folder}/train.parquet", [entry])
    dataset = {
        "kind": "pretrain",
        "row_length": row_length,
        "vocab_size": model.vocab_size,
        "mask_token_id": model.mask_token_id,
        "eos_token_id": model.eos_token_id,
        "pad_token_id": model.pad_token_id,
        "splits": {"train": {"rows": rows, "tokens": entry.tokens, "indexes": ["train.parquet"]}},
    }
    (folder / "manifest.json").write_text(json.dumps({"dataset": dataset}))
    return TokenDataset(str(folder), "train")


class Plain:
    """As one would write it: transformers and LLaDA's GUIDELINES."""

    def __init__(self, setting: Setting, dataset: TokenDataset) -> None:
        config = setting.model
        self.dataset, self.rows, self.dtype = dataset, setting.rows, DTYPES[setting.dtype]
        self.mask_id, self.done = config.mask_token_id, 0
        self.model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.d_model,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.kv_heads,
                intermediate_size=config.ffn_dim,
                max_position_embeddings=config.max_length,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                rms_norm_eps=config.rms_norm_eps,
                use_cache=False,
                pad_token_id=None,
            )
        )
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=OPTIM.lr,
            betas=OPTIM.betas,
            eps=OPTIM.eps,
            weight_decay=OPTIM.weight_decay,
            fused=True,
        )
        self.everybody = torch.ones(setting.rows, 1, setting.row_length, setting.row_length, dtype=torch.bool)

    def loss(self, tokens: Tensor, noisy: Tensor, masked: Tensor, mask_prob: Tensor) -> Tensor:
        """GUIDELINES' loss on these rows (B, L); mask_prob (B, L)."""
        with autocast(CPU, self.dtype):
            logits = self.model(input_ids=noisy, attention_mask=self.everybody).logits
        nats = F.cross_entropy(logits[masked].float(), tokens[masked], reduction="none") / mask_prob[masked]
        return nats.sum() / tokens.numel()

    def step(self) -> float:
        first = self.done * self.rows % len(self.dataset)
        tokens = torch.from_numpy(self.dataset.rows(np.arange(first, first + self.rows)).tokens)
        t = torch.rand(len(tokens))
        mask_prob = ((1 - EPS) * t + EPS)[:, None].expand(tokens.shape)
        masked = torch.rand(tokens.shape) < mask_prob
        loss = self.loss(tokens, torch.where(masked, self.mask_id, tokens), masked, mask_prob)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIM.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return float(loss.detach())


class Ours:
    """As `train` does it, but for what comes in between: logs, validation, checkpoints."""

    def __init__(self, setting: Setting, dataset: TokenDataset, *, compiled: bool = False) -> None:
        self.dtype = DTYPES[setting.dtype]
        self.model = build_parallel(setting.model, CPU, self.dtype, compiled=compiled)
        self.model.init_weights(0)
        self.model.train()
        self.optimizers = build_optimizers(self.model, OPTIM)
        self.stream = BatchStream(
            dataset,
            ObjectiveConfig(document_mask=False),
            setting.model,
            global_rows=setting.rows,
            micro_rows=setting.rows,
            seed=0,
            rank=0,
            num_workers=1,
        )
        self.batches = self.stream.batches(0, 1 << 40)

    def step(self) -> float:
        loss = train_step(self.model, next(self.batches), 1, self.dtype)[0]
        norm = clip_gradients(self.model, OPTIM.grad_clip).double()
        step_all(self.optimizers, skipped=(~torch.isfinite(loss + norm)).float())
        return float(loss)


CONTESTANTS: dict[str, Callable[[Setting, TokenDataset], Plain | Ours]] = {
    "plain": Plain,
    "ours": Ours,
    "compiled": functools.partial(Ours, compiled=True),
}


def check_equality(plain: Plain, ours: Ours) -> dict[str, float]:
    """Gives the plain network our weights. Raises AssertionError where the loss or the gradient on the same masks differ."""
    config = ours.model.config
    names = tensor_names(config, "llama")
    state = {names[name]: parameter.detach() for name, parameter in ours.model.named_parameters()}
    plain.model.load_state_dict(state, strict=True)
    batch = ours.stream.load(0)
    assert config.mask_token_id is not None
    noisy = add_noise(batch, ours.stream.config, ours.stream.seed, config.mask_token_id)
    mask_prob = noisy.mask_prob[:, None].expand(batch.tokens.shape).float()
    expected = plain.loss(batch.tokens, noisy.tokens, noisy.masked, mask_prob)
    expected.backward()
    loss = train_step(ours.model, ours.stream.prepare(0), 1, ours.dtype)[0]
    tolerance = 1e-5 if ours.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(loss, expected.detach().double(), rtol=tolerance, atol=0.0)
    theirs = dict(plain.model.named_parameters())
    worst = 0.0
    for name, parameter in ours.model.named_parameters():
        wanted = theirs[names[name]].grad
        assert parameter.grad is not None
        assert wanted is not None
        error = float((parameter.grad - wanted).norm() / wanted.norm())
        assert error < 5 * tolerance, f"{name}: the gradient differs by {error:.2g} of its norm"
        worst = max(worst, error)
        parameter.grad = None
    plain.optimizer.zero_grad()
    return {"loss": float(loss), "gradient_error": worst}


def race(setting: Setting, dataset: TokenDataset, names: list[str], turns: int, steps: int) -> dict[str, Any]:
    """The contestants in turns, who begins too: how fast each is, and how much faster than the plain one."""
    runs = {name: CONTESTANTS[name](setting, dataset) for name in names}
    plain = runs["plain"]
    assert isinstance(plain, Plain)
    result: dict[str, Any] = {name: {} for name in runs}
    for name, run in runs.items():
        if isinstance(run, Ours):
            result[name]["same_as_plain"] = check_equality(plain, run)
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    for run in [*runs.values()] * 2:
        run.step()
    for turn in range(turns):
        for name in names[:: 1 if turn % 2 == 0 else -1]:
            before, began = time.process_time(), time.perf_counter()
            losses = [runs[name].step() for _ in range(steps)]
            cpu[name].append(time.process_time() - before)
            wall[name].append(time.perf_counter() - began)
            assert np.isfinite(losses).all()
    tokens = steps * setting.rows * setting.row_length
    for name, run in runs.items():
        result[name]["tokens_per_cpu_s"] = tokens / statistics.median(cpu[name])
        result[name]["tokens_per_s"] = tokens / statistics.median(wall[name])
        if isinstance(run, Ours):
            run.batches.close()
            for kind, seconds in (("cpu", cpu), ("wall", wall)):
                ratios = sorted(a / b for a, b in zip(seconds["plain"], seconds[name], strict=True))
                result[name][f"{kind}_ratio"] = statistics.median(ratios)
                result[name][f"{kind}_ratio_range"] = [ratios[0], ratios[-1]]
    return result


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_memory(name: str, setting: Setting) -> int:
    """The peak of three steps of this process, above what it has now."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = setting.write_data(Path(folder))
        small = Setting(512, setting.dtype, 64, 1, 2, 32, setting.threads)
        warm = small.write_data(Path(folder) / "warm")
        CONTESTANTS[name](small, warm).step()  # the libraries are loaded
        before = peak_bytes()
        contestant = CONTESTANTS[name](setting, dataset)
        for _ in range(3):
            contestant.step()
        if isinstance(contestant, Ours):
            contestant.batches.close()
        return max(peak_bytes() - before, 1)


def write_profile(folder: Path, setting: Setting, dataset: TokenDataset) -> None:
    """Tables of operators by their own CPU time, of three steps each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, contestant in CONTESTANTS.items():
        running = contestant(setting, dataset)
        for _ in range(2):
            running.step()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
        ) as profile:
            for _ in range(3):
                running.step()
        table = profile.key_averages(group_by_input_shape=True).table("self_cpu_time_total", row_limit=60)
        (folder / f"{name}-{setting.vocabulary}-{setting.dtype}.txt").write_text(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row-length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--only", help="the settings whose name holds this, 4096-bf16 for one")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    vocabularies, names = VOCABULARIES, list(CONTESTANTS)
    if arguments.quick:
        names.remove("compiled")  # a minute, whatever the size
        arguments.turns, arguments.steps = 2, 1
        arguments.width, arguments.layers, arguments.rows, arguments.row_length = 64, 1, 2, 32
        vocabularies = (512,)
    torch.set_num_threads(arguments.threads)
    settings = {
        f"{vocabulary}-{dtype}": Setting(
            vocabulary,
            dtype,
            arguments.width,
            arguments.layers,
            arguments.rows,
            arguments.row_length,
            arguments.threads,
        )
        for vocabulary in vocabularies
        for dtype in DTYPES
        if not arguments.only or arguments.only in f"{vocabulary}-{dtype}"
    }
    if arguments.memory_of:
        name, label = arguments.memory_of
        print(measure_memory(name, settings[label]))
        return
    if arguments.profile:
        for setting in settings.values():
            with tempfile.TemporaryDirectory() as folder:
                write_profile(arguments.profile, setting, setting.write_data(Path(folder)))
        return
    report: dict[str, Any] = {
        "machine": machine() | {"transformers": transformers.__version__},
        "turns": arguments.turns,
        "steps_a_turn": arguments.steps,
        "results": {},
    }
    # Before the races: a process begins with the peak of the one that has started it.
    peaks: dict[tuple[str, str], int] = {}
    for label, name in itertools.product(settings, names):
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name, label]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[label, name] = int(done.stdout.splitlines()[-1])
    for label, setting in settings.items():
        with tempfile.TemporaryDirectory() as folder:
            dataset = setting.write_data(Path(folder))
            rows = race(setting, dataset, names, arguments.turns, arguments.steps)
        # Weights, gradients and two moments, all in float32.
        state = 16 * setting.model.num_parameters
        report["results"][label] = asdict(setting) | {"state_bytes": state} | rows
        print(f"{label}, weights, gradients and moments {state / 2**20:,.0f} MiB")
        for name, row in rows.items():
            row["peak_bytes"] = peaks[label, name]
            line = f"  {name:10} {row['tokens_per_cpu_s']:8,.0f} tokens per s of CPU"
            if name != "plain":
                row["peak_ratio"] = peaks[label, name] / peaks[label, "plain"]
                low, high = row["cpu_ratio_range"]
                line += f" × {row['cpu_ratio']:.2f} ({low:.2f} to {high:.2f})"
            print(f"{line:70} {row['peak_bytes'] / 2**20:8,.0f} MiB", flush=True)
    report["machine"]["load_after"] = os.getloadavg()[0]
    target = arguments.results / "training.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
