"""A toy corpus that counts modulo eight, prepared as token shards; and a run small enough for one core."""

import dataclasses
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llada
from llada.data.tokens.manifest import write_index
from llada.data.tokens.packing import PackedRows, answer_tokens, concatenate_and_cut, one_per_row
from llada.data.tokens.shards import write_shard
from llada.diffusion.objective import ObjectiveConfig
from llada.model.lora import LoraConfig
from llada.model.transformer import ModelConfig, Transformer
from llada.training.events import Event, StepDone
from llada.training.optim import OptimConfig
from llada.training.parallel import full_state
from llada.training.run import RunConfig, TrainConfig
from llada.training.trainer import TrainResult, train

torch.set_num_threads(1)

EOS, MASK, VOCAB, L = 0, 1, 12, 16


@dataclasses.dataclass(frozen=True)
class Folder:
    """A prepared folder and its unigram counts."""

    url: str
    counts: np.ndarray


def write_folder(path: Path, kind: str, train_shards: list[PackedRows], validation: PackedRows) -> Folder:
    splits: dict[str, Any] = {}
    for split, shards in (("train", train_shards), ("validation", [validation])):
        entries = []
        for number, rows in enumerate(shards):
            entries.append(write_shard(str(path), split, str(number), rows))
        write_index(f"{path}/{split}.parquet", entries)
        splits[split] = {
            "rows": sum(e.rows for e in entries),
            "tokens": sum(e.tokens for e in entries),
            "indexes": [f"{split}.parquet"],
        }
    dataset = {
        "kind": kind,
        "row_length": L,
        "vocab_size": VOCAB,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "splits": splits,
    }
    (path / "manifest.json").write_text(json.dumps({"dataset": dataset}))
    counts = sum(np.bincount(answer_tokens(rows), minlength=VOCAB) for rows in train_shards)
    return Folder(str(path), np.asarray(counts, dtype=np.int64))


def counting_documents(seed: int, number: int) -> list[np.ndarray]:
    """3 4 5 … modulo eight from a random start, of random length, closed by EOS."""
    random = np.random.default_rng(seed)
    starts, lengths = random.integers(0, 8, number), random.integers(4, 20, number)
    return [
        np.append((start + np.arange(n)) % 8 + 2, EOS).astype(np.uint32)
        for start, n in zip(starts, lengths, strict=True)
    ]


@pytest.fixture(scope="session")
def pretrain_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """About 50 packed rows in two shards, and 11 validation rows (an odd number for two workers)."""
    shards = [concatenate_and_cut(counting_documents(seed, 32), L, EOS) for seed in (0, 1)]
    validation = concatenate_and_cut(counting_documents(2, 14), L, EOS)
    rows = 11
    assert len(validation.tokens) >= rows
    cut = PackedRows(
        validation.tokens[:rows],
        validation.segments[: int(validation.segment_offsets[rows])],
        validation.segment_offsets[: rows + 1],
    )
    return write_folder(tmp_path_factory.mktemp("pretrain"), "pretrain", shards, cut)


@pytest.fixture(scope="session")
def rare_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, int]:
    """The same of other documents, and a token that one of the training rows holds many times, and nothing else."""
    rare = VOCAB - 1
    packed = [concatenate_and_cut(counting_documents(seed, 48), L, EOS) for seed in (3, 4)]
    packed[0].tokens[5, 2:] = rare
    return write_folder(tmp_path_factory.mktemp("rare"), "pretrain", packed[:1], packed[1]), rare


@pytest.fixture(scope="session")
def sft_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Prompts of one to five tokens and answers that go on counting, closed by EOS and padded with it."""

    def examples(seed: int, number: int) -> PackedRows:
        random = np.random.default_rng(seed)
        rows = []
        for _ in range(number):
            start, prompt, answer = (
                int(random.integers(0, 8)),
                int(random.integers(1, 6)),
                int(random.integers(1, 8)),
            )
            tokens = [(start + i) % 8 + 2 for i in range(prompt + answer)] + [EOS]
            rows.append((tokens, prompt))
        return one_per_row(rows, L, EOS)

    return write_folder(tmp_path_factory.mktemp("sft"), "sft", [examples(0, 30)], examples(1, 7))


@pytest.fixture(scope="session")
def unified_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Dialogues whole, packed like documents."""
    packed = [concatenate_and_cut(counting_documents(seed, 24), L, EOS) for seed in (5, 6)]
    return write_folder(tmp_path_factory.mktemp("unified"), "unified", packed[:1], packed[1])


@pytest.fixture(scope="session")
def random_weights() -> Callable[[ModelConfig], dict[str, torch.Tensor]]:
    """What a fine-tuning starts from, by our names."""

    def weights(config: ModelConfig) -> dict[str, torch.Tensor]:
        model = Transformer(config)
        model.init_weights(123)
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    return weights


@pytest.fixture(scope="session")
def poisoned() -> Callable[[tuple[ModelConfig, RunConfig], int], dict[str, torch.Tensor]]:
    """Random weights whose embedding of a token is no number: a forward that is fed it has no loss."""

    def weights(configs: tuple[ModelConfig, RunConfig], token: int) -> dict[str, torch.Tensor]:
        model = Transformer(configs[0])
        model.init_weights(0)
        state = {name: p.detach().clone() for name, p in model.named_parameters()}
        state["embed.weight"][token] = math.nan
        return state

    return weights


@pytest.fixture(scope="session")
def make_config() -> Callable[..., tuple[ModelConfig, RunConfig]]:
    """(network, run) with eight rows a step; keyword arguments go to whichever of the configs knows the name."""

    def make(**changes: Any) -> tuple[ModelConfig, RunConfig]:
        model = {
            "vocab_size": VOCAB,
            "d_model": 16,
            "num_layers": 2,
            "num_heads": 2,
            "ffn_dim": 24,
            "max_length": L,
            "mask_token_id": MASK,
            "eos_token_id": EOS,
            "pad_token_id": EOS,
        }
        objective: dict[str, Any] = {}
        # eps: Adam divides by the gradient's size, and entries near zero would turn rounding into whole steps.
        optim: dict[str, Any] = {"lr": 0.01, "muon_lr": 0.01, "warmup_steps": 2, "eps": 1e-4}
        run: dict[str, Any] = {
            "num_steps": 6,
            "global_batch_tokens": 8 * L,
            "micro_batch_rows": 8,
            "precision": "fp32",
            "log_every": 1,
            "validate_every": 100,
            "validation_rows": 11,
            "checkpoint_every": 100,
        }
        lora: dict[str, Any] = {}
        kinds: list[tuple[type, dict]] = [
            (ModelConfig, model),
            (ObjectiveConfig, objective),
            (OptimConfig, optim),
            (TrainConfig, run),
            (LoraConfig, lora),
        ]
        for name, value in changes.items():
            (target,) = [
                values for kind, values in kinds if name in {f.name for f in dataclasses.fields(kind)}
            ]
            target[name] = value
        config = RunConfig(
            ObjectiveConfig(**objective), OptimConfig(**optim), TrainConfig(**run), LoraConfig(**lora)
        )
        return ModelConfig(**model), config

    return make


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training run left: its result and its log."""

    model: ModelConfig
    result: TrainResult
    events: list[Event]

    @property
    def losses(self) -> list[float]:
        return [event.loss for event in self.events if isinstance(event, StepDone)]

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The trained weights."""
        return full_state(self.result.model)


@pytest.fixture(scope="session")
def run_here() -> Callable[..., Run]:
    """Train in this process, as one worker."""

    def run(
        configs: tuple[ModelConfig, RunConfig], folder: Folder, checkpoints: Path | str, **options: Any
    ) -> Run:
        events: list[Event] = []
        result = train(
            *configs,
            folder.url,
            checkpoints=str(checkpoints),
            unigram_counts=folder.counts,
            **{"report": events.append, **options},
        )
        return Run(configs[0], result, events)

    return run


@pytest.fixture(scope="session")
def run_on_workers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[int, dict[str, Any]]]:
    """Run named jobs (keyword arguments of `train`) on groups of gloo processes, given by their numbers of workers; worker
    0's answers, in the same way."""

    def run(jobs: dict[int, dict[str, dict[str, Any]]]) -> dict[int, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("workers")
        (folder / "jobs.pickle").write_bytes(pickle.dumps(jobs))
        script = Path(__file__).with_name("gloo_workers.py")
        source = str(Path(llada.__file__).parents[1])
        done = subprocess.run(
            [sys.executable, str(script), str(folder), source],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=800,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return {number: torch.load(folder / f"answers-{number}.pt", weights_only=False) for number in jobs}

    return run
