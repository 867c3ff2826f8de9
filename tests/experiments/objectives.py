"""What each objective makes of the same network, text, tokens and optimizer; and how noisy it is.

    python tests/experiments/objectives.py --text FOLDER --output FOLDER [--results FOLDER] [--image FILE] [--quick]

The text is FOLDER/tinystories.txt (or FOLDER is a file of that kind: stories, <|endoftext|> behind each), byte by byte; its
last rows are held out, and by as many before them, which nothing is trained on either, learning rates are chosen. Rows are an end-of-text token, which every objective sees and none predicts, and 63 bytes, so that
all of them are asked for the same tokens. Every arm
    1. gets the learning rate that, of a few, is best on the rows of the choice, after a quarter of the steps with a seed of
       its own,
    2. is trained with it once a seed, and
    3. has its bound measured on the held-out rows by the estimator of `llada.perplexity_bound`, with the same masks for all
       (the autoregressive twin has no bound, but the exact −log p).
Seeds change weights, order of the rows and noise; arms of one seed share weights and order, so their difference is taken seed
by seed. ± is the standard error over seeds.

Noise, at fixed weights (of the first arm's first seed, early and at the end) and fixed rows (a global batch), over draws of
times and masks: the standard deviation of the batch's loss, and tr Cov(g) / |E g|² of its gradient g, ± by the jackknife.

Each result is a file in --output when it is there; the same command goes on where it was. At the end it writes
objectives.json into --results, the table into --output/objectives.md and the figure into --image. --quick is to see that it
runs, in seconds, and writes all of it into --output; its figures mean nothing.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from objectives_data import behind_first, left_to_right_nats, rows_of, split_stories
from objectives_report import plot, relative_variance, table
from twins import (
    MASK,
    RATE_SEED,
    command_line,
    head_of_report,
    keep_settings,
    machine,
    mean_and_error,
    once,
    publish,
    slug,
    small_network,
    source_of,
    train_network,
    write_rows,
)

from llada.data.tokens.shards import TokenDataset, load_unigram_counts
from llada.diffusion.likelihood import perplexity_bound
from llada.diffusion.objective import ObjectiveConfig, corrupt, objective_loss
from llada.diffusion.time import TimeConfig
from llada.model.transformer import ModelConfig, Transformer
from llada.training.batches import BatchStream
from llada.training.trainer import TrainResult

LLADA = ObjectiveConfig(document_mask=False)
MDLM = replace(LLADA, schedule="loglinear", subs=True, time=TimeConfig(t_min=1e-3))
# By the name in the table. The first is what others are compared with, and whose weights the noise is measured at.
ARMS: dict[str, ObjectiveConfig] = {
    "LLaDA, stratified": LLADA,
    "LLaDA, independent": replace(LLADA, time=TimeConfig(sampling="independent")),
    "LLaDA, Sobol": replace(LLADA, time=TimeConfig(sampling="sobol")),
    "LLaDA, t in [0.1, 0.8]": replace(LLADA, time=TimeConfig(t_min=0.1, t_max=0.8)),
    "LLaDA, log t in [0.1, 0.8]": replace(LLADA, time=TimeConfig(density="importance", t_min=0.1, t_max=0.8)),
    "LLaDA, bell": replace(LLADA, time=TimeConfig(density="bell")),
    "MDLM, log-linear": MDLM,
    "MDLM, cosine": replace(MDLM, schedule="cosine"),
    "MDLM, cosine²": replace(MDLM, schedule="cosine2"),
    "MDLM, linear": replace(MDLM, schedule="linear"),
    "MDLM, geometric": replace(MDLM, schedule="geometric"),
    "MDLM, T = 1000": replace(MDLM, time=TimeConfig(levels=1_000)),
    "MDLM without carry-over": replace(MDLM, carry_over=False),
    "MDLM without zero masking": replace(MDLM, subs=False),
    "BERT, 15 %": replace(LLADA, schedule="bert"),
    "autoregressive, exact": replace(LLADA, kind="autoregressive"),
}
BASE = next(iter(ARMS))


@dataclass(frozen=True)
class Size:
    """What an experiment costs."""

    num_steps: int
    rates: tuple[float, ...]
    """Of Muon; AdamW's, for embedding, head and norms, is 0.3 of it."""
    seeds: tuple[int, ...] = (0, 1, 2)
    early_step: int = 40
    batch_rows: int = 16
    row_length: int = 64
    d_model: int = 64
    num_layers: int = 2
    held_out_rows: int = 512
    """Of the table; and as many of the choice of the rate."""
    num_samples: int = 3
    """Masks of each held-out row."""
    noise_batches: int = 2
    noise_draws: int = 24


FULL = Size(num_steps=200, rates=(0.01, 0.02, 0.04))
QUICK = Size(
    num_steps=8, rates=(0.01, 0.02), seeds=(0, 1), early_step=4, batch_rows=4, row_length=16, d_model=32, num_layers=1,
    held_out_rows=16, num_samples=1, noise_batches=1, noise_draws=4,
)  # fmt: skip


class Experiment:
    """All arms on one text, of one size; what is done lies in `folder`."""

    def __init__(self, text: Path, folder: Path, size: Size) -> None:
        self.folder, self.size, self.data = folder, size, folder / "data"
        stories = text.read_bytes()
        settings = {
            "size": asdict(size),
            "arms": {name: objective.content() for name, objective in ARMS.items()},
            "text": source_of(text),
        }
        self.settings = keep_settings(folder, settings)

        def write_data() -> dict[str, int]:
            ends = {"validation": size.held_out_rows, "held_out": size.held_out_rows}
            splits, vocab_size = split_stories(stories, size.row_length, ends)
            write_rows(self.data, splits, vocab_size)
            return {"vocab_size": vocab_size}

        self.vocab_size = once(folder / "data.json", write_data)["vocab_size"]
        self.counts = load_unigram_counts(str(self.data))
        # Rates are chosen by "validation", and the table is of "held_out".
        self.of_choice, self.held_out = (rows_of(self.data, split) for split in ("validation", "held_out"))
        self.asked = behind_first(self.held_out)
        log_p = np.log((self.counts + 1) / (self.counts + 1).sum())
        self.unigram = float(-log_p[self.held_out[self.asked]].mean())

    def network(self, objective: ObjectiveConfig) -> ModelConfig:
        return small_network(
            objective,
            vocab_size=self.vocab_size,
            row_length=self.size.row_length,
            d_model=self.size.d_model,
            num_layers=self.size.num_layers,
        )

    def train(
        self,
        objective: ObjectiveConfig,
        checkpoints: Path,
        *,
        rate: float,
        seed: int,
        num_steps: int,
        stop_at: int | None = None,
    ) -> TrainResult:
        return train_network(
            self.network(objective),
            objective,
            self.data,
            checkpoints,
            rate=rate,
            seed=seed,
            num_steps=num_steps,
            batch_rows=self.size.batch_rows,
            validation_rows=1,  # `bound` asks more
            stop_at=stop_at,
        )

    def load(self, objective: ObjectiveConfig, state: dict[str, torch.Tensor]) -> Transformer:
        network = Transformer(self.network(objective))
        network.load_state_dict(state)
        return network

    def bound(
        self, objective: ObjectiveConfig, result: TrainResult, rows: torch.Tensor, num_samples: int
    ) -> float:
        """Nats per token of these rows."""
        assert result.model is not None
        network, asked = result.model.eval(), behind_first(rows)
        if objective.kind == "autoregressive":
            return float(left_to_right_nats(network, rows).sum() / asked.sum())
        return perplexity_bound(network, rows, maskable=asked, num_samples=num_samples).nats_per_token

    def choose_rate(self, name: str) -> dict[str, Any]:
        """Step 1: {"rate": the best one, "bounds": of each, on the rows of the choice}."""

        def make() -> dict[str, Any]:
            bounds = []
            for rate in self.size.rates:
                checkpoints = self.folder / "checkpoints" / f"{slug(name)}-rate-{rate}"
                result = self.train(
                    ARMS[name],
                    checkpoints,
                    rate=rate,
                    seed=RATE_SEED,
                    num_steps=max(2, self.size.num_steps // 4),
                )
                bounds.append(self.bound(ARMS[name], result, self.of_choice, 1))
                shutil.rmtree(checkpoints)
            best = self.size.rates[int(np.argmin(bounds))]
            return {"rate": best, "bounds": bounds}

        return once(self.folder / "rates" / f"{slug(name)}.json", make)

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """Steps 2 and 3 for one seed: {"bound": nats per token, …}; the CPU's time with that of step 1 where it was due."""

        def make() -> dict[str, Any]:
            begun = time.process_time()
            rate = self.choose_rate(name)["rate"]
            checkpoints = self.folder / "checkpoints" / f"{slug(name)}-{seed}"
            steps, setting = self.size.num_steps, {"rate": rate, "seed": seed}
            keeps = name == BASE and seed == self.size.seeds[0]
            early = self.folder / "early.pt"
            if keeps and not early.exists():
                stopped = self.train(
                    ARMS[name], checkpoints, **setting, num_steps=steps, stop_at=self.size.early_step
                )
                torch.save(stopped.model.state_dict(), early.with_suffix(".part"))
                early.with_suffix(".part").replace(early)
            result = self.train(ARMS[name], checkpoints, **setting, num_steps=steps)
            if keeps:
                torch.save(result.model.state_dict(), self.folder / "final.pt")
            bound = self.bound(ARMS[name], result, self.held_out, self.size.num_samples)
            shutil.rmtree(checkpoints)
            return {
                "bound": bound,
                "rate": rate,
                "tokens": result.tokens,
                "cpu_s": time.process_time() - begun,
                "commit": machine()["commit"],
            }

        return once(self.folder / "runs" / f"{slug(name)}-{seed}.json", make)

    def noise(self, name: str, weights: str) -> dict[str, Any] | None:
        """At the weights "early" or "final"; None of the autoregressive arm, which has none."""
        objective = ARMS[name]
        if objective.kind == "autoregressive":
            return None

        def make() -> dict[str, Any]:
            begun = time.process_time()
            network = self.load(objective, torch.load(self.folder / f"{weights}.pt"))
            stream = BatchStream(
                TokenDataset(str(self.data), "train"),
                objective,
                network.config,
                global_rows=self.size.batch_rows,
                micro_rows=self.size.batch_rows,
                seed=0,
                rank=0,
                num_workers=1,
            )
            spreads, grams = [], []
            for step in range(self.size.noise_batches):
                batch = stream.load(step)
                losses, gradients = [], []
                for draw in range(self.size.noise_draws):
                    again = replace(batch, step=draw, epochs=torch.full_like(batch.epochs, draw))
                    micro = corrupt(
                        again, objective, normalizer=int(batch.maskable.sum()), seed=step, mask_id=MASK
                    )
                    loss = objective_loss(network, micro)
                    parts = torch.autograd.grad(loss, list(network.parameters()))
                    losses.append(float(loss.detach()))
                    gradients.append(torch.cat([part.flatten() for part in parts]).double())
                spreads.append(statistics.variance(losses))
                grams.append((stacked := torch.stack(gradients)) @ stacked.T)
            ratio, error = relative_variance(torch.stack(grams))
            return {
                "loss_std": statistics.fmean(spreads) ** 0.5,
                "gradient_variance": ratio,
                "standard_error": error,
                "cpu_s": time.process_time() - begun,
            }

        return once(self.folder / "noise" / f"{slug(name)}-{weights}.json", make)


def summarise(experiment: Experiment, before: dict[str, Any]) -> dict[str, Any]:
    """All that is known, as objectives.json has it."""
    seeds = experiment.size.seeds
    base = [experiment.run(BASE, seed)["bound"] for seed in seeds]
    rows, done, noise_s = [], [], 0.0
    for name in ARMS:
        runs = [experiment.run(name, seed) for seed in seeds]
        noise = {weights: experiment.noise(name, weights) for weights in ("early", "final")}
        bounds = [run["bound"] for run in runs]
        rates = experiment.choose_rate(name)
        done += runs
        noise_s += sum(part["cpu_s"] for part in noise.values() if part)
        rows.append(
            {
                "arm": name,
                "bounds": bounds,
                "bound": mean_and_error(bounds),
                "difference": mean_and_error([a - b for a, b in zip(bounds, base, strict=True)]),
                "rate": rates["rate"],
                "bounds_by_rate": rates["bounds"],
                "noise": noise,
            }
        )
    first = experiment.run(BASE, seeds[0])
    head = head_of_report(before, done)
    return {
        **head,
        "cpu_s": head["cpu_s"] + noise_s,
        "settings": experiment.settings,
        "parameters": experiment.network(LLADA).num_parameters,
        "tokens": first["tokens"],
        "held_out_tokens": int(experiment.asked.sum()),
        "unigram": experiment.unigram,
        "base": BASE,
        "rows": rows,
    }


def main(words: Sequence[str] | None = None) -> None:
    arguments = command_line(__doc__, text="tinystories.txt", with_scale=False).parse_args(words)
    before = machine()
    experiment = Experiment(arguments.text, arguments.output, QUICK if arguments.quick else FULL)
    for seed in experiment.size.seeds:
        for name in ARMS:
            run = experiment.run(name, seed)
            print(f"seed {seed}  {name:28} {run['bound']:.4f}  ({run['cpu_s']:.0f} s of CPU)", flush=True)
    report = summarise(experiment, before)
    print(f"\nunigram {report['unigram']:.3f}")
    publish(report, "objectives", arguments, table, plot)


if __name__ == "__main__":
    main()
