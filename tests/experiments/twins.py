"""What the experiments share: results that stay, a folder of given rows, the small network and its training, writing from left
to right, the command line.

Twins are networks of one size that learn the same rows in the same order from the same first weights, at the same number of
tokens; they differ in the objective, and in whether a position sees what is behind it. Each gets the learning rate that, of
a few, is best for it after a quarter of the steps with a seed of its own, on the rows of the split "validation": what an
experiment with a choice reports is of others. ± is the standard error over seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from sampling_model import machine

from llada.data.tokens.manifest import write_index
from llada.data.tokens.packing import Kind, PackedRows, answer_tokens
from llada.data.tokens.shards import TokenDataset, load_unigram_counts, write_shard, write_unigram_counts
from llada.diffusion.objective import ObjectiveConfig
from llada.diffusion.time import TimeConfig
from llada.model.predict import device_of
from llada.model.transformer import ModelConfig, Transformer
from llada.training.events import Event, EventSink, Validated
from llada.training.optim import OptimConfig
from llada.training.parallel import Precision
from llada.training.run import RunConfig, TrainConfig
from llada.training.trainer import TrainResult, train

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parents[1] / ".github" / "images"
RATE_SEED = 1000
# With these every vocabulary begins.
EOS, MASK, FIRST_SIGN = 0, 1, 2

# Noise up to 1, because an answer begins as nothing but masks; every row weighs the same.
LLADA = ObjectiveConfig(document_mask=False, time=TimeConfig(density="importance", t_min=0.1, t_max=1.0))
TWINS = {"LLaDA": LLADA, "autoregressive": ObjectiveConfig(kind="autoregressive", document_mask=False)}


def once(file: Path, make: Callable[[], Any]) -> Any:
    """What `make` gives, as JSON, kept in this file: made if it is not there yet."""
    if not file.exists():
        made = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = file.with_suffix(".part")
        whole.write_text(json.dumps(made, indent=1) + "\n")
        whole.replace(file)
    return json.loads(file.read_text())


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """These settings as the folder has them. SystemExit where it holds an experiment of others."""
    kept = once(folder / "settings.json", lambda: settings)
    if kept != json.loads(json.dumps(settings)):
        raise SystemExit(f"{folder} holds an experiment of other settings: choose another --output")
    return kept


def source_of(file: Path) -> dict[str, Any]:
    """By which a text that was learned is known, wherever it lies."""
    content = file.read_bytes()
    return {"name": file.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9²]+", "-", name.lower()).strip("-")


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def write_rows(folder: Path, splits: Mapping[str, tuple[np.ndarray, np.ndarray]], vocab_size: int) -> None:
    """A prepared folder with an example in each row: by split the tokens (R, L) and how many at a row's beginning are a prompt
    (R,), which is seen and never asked for."""
    packed = {}
    for split, (tokens, prompts) in splits.items():
        R, L = tokens.shape
        segments = np.stack([np.zeros(R), prompts, np.full(R, L)], axis=1).astype(np.uint32)
        packed[split] = PackedRows(tokens.astype(np.uint32), segments, np.arange(R + 1, dtype=np.uint64))
    write_packed(folder, packed, vocab_size)


def write_packed(
    folder: Path, splits: Mapping[str, PackedRows], vocab_size: int, kind: Kind = "pretrain"
) -> None:
    """A prepared folder of these rows by split."""
    entries = {}
    for split, packed in splits.items():
        entry = write_shard(str(folder), split, "0", packed, list_lengths=kind == "sft")
        write_index(f"{folder}/{split}.parquet", [entry])
        entries[split] = {"rows": entry.rows, "tokens": entry.tokens, "indexes": [f"{split}.parquet"]}
    counts = np.bincount(answer_tokens(splits["train"]), minlength=vocab_size)
    write_unigram_counts(str(folder), counts.astype(np.int64))
    dataset = {
        "kind": kind,
        "row_length": splits["train"].tokens.shape[1],
        "vocab_size": vocab_size,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "splits": entries,
    }
    (folder / "manifest.json").write_text(json.dumps({"dataset": dataset}))


def small_network(
    objective: ObjectiveConfig, *, vocab_size: int, row_length: int, d_model: int, num_layers: int
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=d_model // 32,
        ffn_dim=3 * d_model,
        max_length=row_length,
        # What gets so small a masked network off the unigram plateau in so few steps, by experiment.
        rope_theta=10.0,
        qk_norm=True,
        mask_token_id=MASK,
        eos_token_id=EOS,
        pad_token_id=EOS,
        causal=objective.kind == "autoregressive",
    )


def train_network(
    network: ModelConfig,
    objective: ObjectiveConfig,
    data: Path,
    checkpoints: Path,
    *,
    rate: float,
    seed: int,
    num_steps: int,
    batch_rows: int,
    validation_rows: int,
    precision: Precision = "fp32",
    compiled: bool = False,
    initial_state: Mapping[str, Tensor] | None = None,
    stop_at: int | None = None,
    validate_every: int | None = None,
    report: EventSink | None = None,
) -> TrainResult:
    """The trainer on a folder of rows. `rate` is Muon's; AdamW's, for embedding, head and
    norms, is 0.3 of it. Without `validate_every` the end is validated alone."""
    config = RunConfig(
        objective=objective,
        optim=OptimConfig(
            optimizer="muon",
            lr=0.3 * rate,
            muon_lr=rate,
            weight_decay=0.0,
            warmup_steps=num_steps // 20,
            decay_fraction=0.4,
            final_lr_ratio=0.01,
        ),
        train=TrainConfig(
            num_steps=num_steps,
            global_batch_tokens=batch_rows * TokenDataset(str(data), "train").row_length,
            micro_batch_rows=batch_rows,
            precision=precision,
            compile=compiled,
            seed=seed,
            log_every=num_steps,
            validate_every=validate_every or num_steps,
            validation_rows=validation_rows,
            checkpoint_every=num_steps,
        ),
    )
    return train(
        network,
        config,
        str(data),
        checkpoints=str(checkpoints),
        unigram_counts=load_unigram_counts(str(data)),
        initial_state=initial_state,
        stop_at=stop_at,
        report=report,
    )


@dataclass(frozen=True)
class Learning:
    """A network and how long it learns: the same for both twins."""

    num_steps: int
    batch_rows: int
    rates: tuple[float, ...]
    """Of Muon, to choose from."""
    d_model: int = 128
    num_layers: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)
    validation_rows: int = 128
    """By which the rate is chosen."""
    validations: int = 1
    """Of a training, evenly spread over it: the points of its curve."""
    precision: Precision = "fp32"
    compiled: bool = False
    """The blocks; worth its half minute on a GPU."""

    @property
    def rows(self) -> int:
        """As many as a training sees."""
        return self.num_steps * self.batch_rows


@dataclass(frozen=True)
class Twins:
    """The twins on the rows of `data`; what is done lies in `folder`."""

    folder: Path
    data: Path
    vocab_size: int
    row_length: int
    learning: Learning
    objectives: Mapping[str, ObjectiveConfig] = field(default_factory=lambda: TWINS)

    def network(self, name: str) -> ModelConfig:
        return small_network(
            self.objectives[name],
            vocab_size=self.vocab_size,
            row_length=self.row_length,
            d_model=self.learning.d_model,
            num_layers=self.learning.num_layers,
        )

    def train(
        self,
        name: str,
        checkpoints: Path,
        *,
        rate: float,
        seed: int,
        num_steps: int,
        report: EventSink | None = None,
    ) -> TrainResult:
        return train_network(
            self.network(name),
            self.objectives[name],
            self.data,
            checkpoints,
            rate=rate,
            seed=seed,
            num_steps=num_steps,
            batch_rows=self.learning.batch_rows,
            validation_rows=self.learning.validation_rows,
            precision=self.learning.precision,
            compiled=self.learning.compiled,
            validate_every=-(-num_steps // self.learning.validations),
            report=report,
        )

    def choose_rate(self, name: str) -> dict[str, Any]:
        """{"rate": the best one, "losses": of each}, nats per token of the validation rows."""

        def make() -> dict[str, Any]:
            rates, losses = self.learning.rates, []
            for rate in rates if len(rates) > 1 else ():
                checkpoints = self.folder / "checkpoints" / f"{slug(name)}-rate-{rate}"
                num_steps = max(2, self.learning.num_steps // 4)
                result = self.train(name, checkpoints, rate=rate, seed=RATE_SEED, num_steps=num_steps)
                losses.append(result.validation_loss)
                shutil.rmtree(checkpoints)
            return {"rate": rates[int(np.argmin(losses)) if losses else 0], "losses": losses}

        return once(self.folder / "rates" / f"{slug(name)}.json", make)

    def run(
        self, name: str, seed: int, measure: Callable[[Transformer, TrainResult], dict[str, Any]]
    ) -> dict[str, Any]:
        """What `measure` finds out about the twin of this seed, in evaluation mode; with the rate, the validation losses by steps,
        the last one, and the CPU's time, that of the choice of the rate included where it was due."""

        def make() -> dict[str, Any]:
            begun = time.process_time()
            rate = self.choose_rate(name)["rate"]
            checkpoints = self.folder / "checkpoints" / f"{slug(name)}-{seed}"
            curve: list[tuple[int, float]] = []

            def note(event: Event) -> None:
                if isinstance(event, Validated):
                    curve.append((event.step, event.loss))

            num_steps = self.learning.num_steps
            result = self.train(name, checkpoints, rate=rate, seed=seed, num_steps=num_steps, report=note)
            assert result.model is not None
            measured = measure(result.model.eval(), result)
            shutil.rmtree(checkpoints)
            return {
                **measured,
                "curve": curve,
                "validation_loss": result.validation_loss,
                "rate": rate,
                "tokens": result.tokens,
                "cpu_s": time.process_time() - begun,
                "commit": machine()["commit"],
            }

        file = self.folder / "runs" / f"{slug(name)}-{seed}.json"
        is_new = not file.exists()
        found = once(file, make)
        if is_new:
            print(
                f"{name:16} seed {seed}  loss {found['validation_loss']:.4f}  {found['cpu_s']:.0f} s of CPU",
                flush=True,
            )
        return found


@torch.no_grad()
def write_left_to_right(model: Transformer, prompts: Tensor, length: int) -> Tensor:
    """(B, length) int64: behind the prompts (B, P) an autoregressive network's likeliest token, again and again."""
    tokens = prompts.to(device_of(model))
    last = torch.arange(1, len(tokens) + 1, device=tokens.device)
    for _ in range(length):
        logits = model(tokens, logits_at=last * tokens.shape[1] - 1)
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens[:, prompts.shape[1] :]


def command_line(
    description: str | None, *, text: str | None = None, with_scale: bool = True
) -> argparse.ArgumentParser:
    """What every experiment takes; with `text`, also a file of that name, or the folder that it is in."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="what is done, to go on with")
    parser.add_argument("--results", type=Path, help="folder for the result")
    parser.add_argument("--image", type=Path, help="file for the figure")
    if text is not None:
        parser.add_argument(
            "--text",
            type=lambda word: Path(word, text) if Path(word).is_dir() else Path(word),
            required=True,
            help=f"a file, or a folder with {text}",
        )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="seconds, to see that it runs")
    if with_scale:
        size.add_argument("--scale", action="store_true", help="the published size, for a GPU")
    torch.set_num_threads(1)
    # A checkpoint of one process is what is wanted.
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    return parser


def publish(
    report: dict[str, Any],
    name: str,
    arguments: argparse.Namespace,
    table: Callable[[dict[str, Any]], str],
    plot: Callable[[dict[str, Any], Path], None],
) -> None:
    """Write `name`.json, `name`.md and `name`.png: beside the code if the size is the committed one, else into --output."""
    here: Path = arguments.output
    is_committed = not (arguments.quick or getattr(arguments, "scale", False))
    results = arguments.results or (HERE / "results" if is_committed else here)
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    (here / f"{name}.md").write_text(table(report))
    plot(report, arguments.image or (IMAGES if is_committed else here) / f"{name}.png")
    print(f"\n{report['cpu_s'] / 60:.0f} minutes of CPU\n\n{table(report)}")


def head_of_report(before: dict[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where, by which code and at what cost: `before` is `machine()` at the beginning."""
    return {
        "machine": {**before, "load_after": os.getloadavg()[0]},
        "commits": sorted({run["commit"] for run in runs}),
        "cpu_s": sum(run["cpu_s"] for run in runs),
    }


def draw_figure(*, width: float = 11, height: float = 4, sharey: bool = False) -> tuple[Any, Any]:
    """A figure without a display, and its two axes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(1, 2, figsize=(width, height), sharey=sharey, layout="constrained")


def save_figure(figure: Any, target: Path) -> None:
    from matplotlib import pyplot as plt

    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    plt.close(figure)
