"""The small model of the sampler's benchmarks: string and number tasks with exact answers, learned in half an hour.

    python tests/benchmarks/sampling_model.py FOLDER [--text FOLDER] [--steps N] [--threads N] [--quick]

Trains with `llada.training`, without Ray, into FOLDER/trained (1.4 M parameters), and writes FOLDER/random-20m, random
weights for speed alone. The weights are not committed: a benchmark is given FOLDER, and writes down what it found there.
`--text` takes every .txt below a folder: one document in twenty is then such text, to go on with.

Every answer follows from its prompt, has 2 to 32 tokens (bytes) and is closed by EOS. Prompts whose checksum falls into
one of 16 classes are held out of the training; `held_out` draws from those alone. --quick trains for seconds, to see that
it runs; such a model knows nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llada.data.tokens.manifest import write_index
from llada.data.tokens.packing import PackedRows, answer_tokens
from llada.data.tokens.shards import write_shard
from llada.diffusion.objective import ObjectiveConfig
from llada.diffusion.time import TimeConfig
from llada.model.hf import save_model
from llada.model.transformer import ModelConfig, Transformer
from llada.tokenizer import encode_texts, save_tokenizer, train_tokenizer
from llada.training.events import Event, StepDone, Validated
from llada.training.optim import OptimConfig
from llada.training.run import RunConfig, TrainConfig
from llada.training.trainer import train

HERE = Path(__file__).resolve().parent
GEN_LENGTH = 48  # masks behind a prompt; what the model is trained to fill
WIDTH = 32  # of the question, and the most that an answer has
VOCABULARY = 262  # six special tokens and the bytes
ROW_LENGTH = 192
BATCH_ROWS = 16
STEPS = 5_000
# Each is seen once. Another number of steps does not change the data: a run may become shorter or longer on its way.
ROWS = STEPS * BATCH_ROWS
LETTERS = "abcdefghijklmnop"  # few, so that little is to be learned about each
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FILLER = (
    "the", "of", "to", "and", "in", "is", "it", "that", "was", "on", "for", "with", "as", "his", "they", "at", "this",
    "from", "have", "by", "had", "not", "but", "what", "all", "were", "when", "we", "there", "can", "your", "which",
    "their", "said", "if", "do", "will", "each", "about", "how",
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    task: str
    prompt: str
    answer: str


def _letters(random: random.Random, n: int) -> str:
    return "".join(random.choices(LETTERS, k=n))


def _digits(random: random.Random, n: int) -> str:
    return "".join(random.choices("0123456789", k=n))


def _upper(random: random.Random) -> tuple[str, str]:
    text = _letters(random, random.randint(4, WIDTH))
    return text, text.upper()


def _next(random: random.Random) -> tuple[str, str]:
    """Of each letter the next one."""
    text = _letters(random, random.randint(4, WIDTH))
    return text, "".join(_after(letter) for letter in text)


def _swap(random: random.Random) -> tuple[str, str]:
    """Two letters change places."""
    pairs = [_letters(random, 2) for _ in range(random.randint(2, WIDTH // 3))]
    return " ".join(pairs), " ".join(pair[::-1] for pair in pairs)


def _sort(random: random.Random) -> tuple[str, str]:
    """Three letters in alphabetical order."""
    triples = [_letters(random, 3) for _ in range(random.randint(1, WIDTH // 4))]
    return " ".join(triples), " ".join("".join(sorted(triple)) for triple in triples)


def _add(random: random.Random) -> tuple[str, str]:
    """Two numbers one behind the other, and their sum; the ones stand first, so that the carry goes to the right."""
    n = random.randint(2, 10)
    a, b = _digits(random, n), _digits(random, n)
    total = str(int(a[::-1]) + int(b[::-1])).zfill(n)[::-1]
    return a.ljust(WIDTH // 2, ".") + b, total


def _parity(random: random.Random) -> tuple[str, str]:
    """Whether the ones so far are odd: each bit needs the one before."""
    bits = random.choices((0, 1), k=random.randint(4, WIDTH))
    return "".join(map(str, bits)), "".join(str(sum(bits[: i + 1]) % 2) for i in range(len(bits)))


def _alphabet(random: random.Random) -> tuple[str, str]:
    """On from a letter, as far as there are places."""
    text = _letters(random, 1)
    n = random.randint(3, WIDTH)
    while len(text) < n:
        text += _after(text[-1])
    return text[0].ljust(n, "_"), text


def _spell(random: random.Random) -> tuple[str, str]:
    digits = _digits(random, random.randint(1, WIDTH // 6))
    return "".join(digit.ljust(6, "_") for digit in digits), "".join(
        DIGITS[int(digit)].ljust(6) for digit in digits
    )


def _after(letter: str) -> str:
    return LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)]


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "upper": _upper,
    "next": _next,
    "swap": _swap,
    "sort": _sort,
    "add": _add,
    "parity": _parity,
    "alphabet": _alphabet,
    "spell": _spell,
}
# Of the training's problems: what needs more than one look at the question is seen more often.
_SHARES = [{"sort": 2, "add": 3, "parity": 3}.get(task, 1) for task in TASKS]


def draw(task: str, random: random.Random, *, is_held_out: bool) -> Problem:
    """A problem on this or on the other side of the border between what is trained on and what is asked."""
    while True:
        question, answer = TASKS[task](random)
        # The question stands in a field of one width: a part of the answer is always as far from what it depends on.
        prompt = f"{task} {question.ljust(WIDTH, '.')}="
        if (zlib.crc32(prompt.encode()) % 16 == 0) == is_held_out:
            break
    # Every fourth prompt is longer: words that have nothing to do with it stand before it.
    if random.random() < 0.25:
        prompt = " ".join(random.choices(FILLER, k=random.randint(3, 12))) + "\n" + prompt
    return Problem(task, prompt, answer)


def held_out(number: int, seed: int = 0) -> list[Problem]:
    """Problems that no training has seen, the tasks in turn, in random order."""
    source = random.Random(f"held out {seed}")
    names = list(TASKS)
    problems = [draw(names[i % len(names)], source, is_held_out=True) for i in range(number)]
    source.shuffle(problems)
    return problems


def build_tokenizer() -> Any:
    """One token a byte."""
    return train_tokenizer([], VOCABULARY)


def _documents(texts: list[str], seed: int) -> Iterator[tuple[str, str]]:
    """(prompt, answer) without end: problems, and one text in twenty where there are texts."""
    source = random.Random(f"trained on {seed}")
    while True:
        if texts and source.random() < 0.05:
            text = source.choice(texts)
            at = source.randrange(max(1, len(text) - 110))
            split = at + source.randint(20, 50)
            yield text[at:split], text[split : split + source.randint(30, 60)]
        else:
            (task,) = source.choices(list(TASKS), _SHARES)
            problem = draw(task, source, is_held_out=False)
            yield problem.prompt, problem.answer


def _pack(documents: Iterator[tuple[str, str]], rows: int, tokenizer: Any, seed: int) -> PackedRows:
    """Rows full of documents, none of them cut: what is left of a row becomes the EOS tail of one of them.

    One document in four has a tail as long as the canvas that it will be asked on: what stands behind an answer is learned
    as well.
    """
    source = random.Random(f"tails {seed}")
    eos = tokenizer.eos_token_id
    tokens, segments, offsets = np.full((rows, ROW_LENGTH), eos, np.uint32), [], [0]
    waiting: tuple[list[int], list[int]] | None = None
    for row in range(rows):
        held: list[tuple[list[int], list[int]]] = []
        space = ROW_LENGTH
        while True:
            if waiting is None:
                prompt, answer = encode_texts(tokenizer, next(documents))
                tail = GEN_LENGTH - len(answer) if source.random() < 0.25 else 1
                waiting = list(prompt), list(answer) + [eos] * max(1, tail)
            size = len(waiting[0]) + len(waiting[1])
            if size > space:
                break
            held.append(waiting)
            space, waiting = space - size, None
        source.choice(held)[1].extend([eos] * space)
        start = 0
        for prompt_ids, answer_ids in held:
            middle, end = start + len(prompt_ids), start + len(prompt_ids) + len(answer_ids)
            tokens[row, start:end] = prompt_ids + answer_ids
            segments.append((start, middle, end))
            start = end
        offsets.append(len(segments))
    return PackedRows(tokens, np.array(segments, np.uint32), np.array(offsets, np.uint64))


def write_data(folder: Path, tokenizer: Any, texts: list[str], rows: int) -> np.ndarray:
    """A prepared folder of packed rows whose answers alone are learned; the counts of what is learned."""
    splits: dict[str, Any] = {}
    counts = np.zeros(VOCABULARY, np.int64)
    for seed, (split, number) in enumerate({"train": rows, "validation": 128}.items()):
        packed = _pack(_documents(texts, seed), number, tokenizer, seed)
        entry = write_shard(str(folder), split, "0", packed)
        write_index(f"{folder}/{split}.parquet", [entry])
        splits[split] = {"rows": entry.rows, "tokens": entry.tokens, "indexes": [f"{split}.parquet"]}
        if split == "train":
            counts += np.bincount(answer_tokens(packed), minlength=VOCABULARY)
    dataset = {
        "kind": "pretrain",
        "row_length": ROW_LENGTH,
        "vocab_size": VOCABULARY,
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "splits": splits,
    }
    (folder / "manifest.json").write_text(json.dumps({"dataset": dataset}))
    return counts


def model_config(
    tokenizer: Any, *, d_model: int, num_layers: int, num_heads: int, ffn_dim: int
) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        ffn_dim=ffn_dim,
        max_length=512,
        rope_theta=100.0,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def run_config(num_steps: int) -> RunConfig:
    return RunConfig(
        # Noise up to 1, because an answer begins as nothing but masks; every row weighs the same.
        objective=ObjectiveConfig(time=TimeConfig(density="importance", t_min=0.1, t_max=1.0)),
        optim=OptimConfig(
            optimizer="muon",
            lr=3e-3,
            muon_lr=1e-2,
            weight_decay=0.0,
            warmup_steps=min(30, num_steps),
            decay_fraction=0.4,
            final_lr_ratio=0.01,
        ),
        train=TrainConfig(
            num_steps=num_steps,
            global_batch_tokens=BATCH_ROWS * ROW_LENGTH,
            micro_batch_rows=BATCH_ROWS,
            log_every=50,
            validate_every=500,
            validation_rows=128,
            checkpoint_every=200,
            keep_checkpoints=1,
        ),
    )


def read_texts(folder: Path | None) -> list[str]:
    """Paragraphs of every .txt below the folder; none without one."""
    files = sorted(folder.rglob("*.txt")) if folder else []
    paragraphs = [
        paragraph.strip()
        for file in files
        for paragraph in file.read_text(encoding="utf-8-sig").split("\n\n")
    ]
    return [paragraph for paragraph in paragraphs if len(paragraph) > 100 and paragraph.isascii()]


def train_model(folder: Path, texts: list[str], num_steps: int) -> dict[str, Any]:
    """Train, or go on with a run that was interrupted; the report, which lies beside the weights too."""
    tokenizer = build_tokenizer()
    config = run_config(num_steps)
    network = model_config(tokenizer, d_model=160, num_layers=4, num_heads=4, ffn_dim=480)
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    counts = write_data(data, tokenizer, texts, ROWS)

    def report(event: Event) -> None:
        if isinstance(event, StepDone):
            print(
                f"step {event.step:6}  loss {event.loss:.4f}  {event.tokens_per_second:,.0f} tokens/s",
                flush=True,
            )
        elif isinstance(event, Validated):
            print(f"step {event.step:6}  validation {event.loss:.4f}", flush=True)

    cpu = time.process_time()
    result = train(
        network,
        config,
        str(data),
        checkpoints=str(folder / "checkpoints"),
        unigram_counts=counts,
        report=report,
    )
    assert result.model is not None
    save_model(result.model, folder / "trained")
    save_tokenizer(tokenizer, folder / "trained")
    figures = {
        "parameters": network.num_parameters,
        "steps": result.num_steps,
        "tokens": result.tokens,
        "texts": len(texts),
        "validation_loss": result.validation_loss,
        "wall_s": result.seconds,
        "cpu_s": time.process_time() - cpu,
        "threads": torch.get_num_threads(),
        "settings": asdict(config),
    }
    (folder / "trained" / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def write_random_model(folder: Path) -> int:
    """The 20 M network; its number of parameters."""
    tokenizer = build_tokenizer()
    config = model_config(tokenizer, d_model=512, num_layers=6, num_heads=8, ffn_dim=1408)
    model = Transformer(config)
    model.init_weights(0)
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)
    return config.num_parameters


def machine(repository: Path = HERE) -> dict[str, Any]:
    """Where, with what, how busy, and the commit of what is measured: the head of a result."""
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=repository, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git("rev-parse", "HEAD"),
        "changed_files": len(git("status", "--porcelain").splitlines()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, help="folder of .txt files")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    parameters = write_random_model(arguments.folder / "random-20m")
    print(f"random-20m: {parameters:,} parameters")
    steps = 20 if arguments.quick else arguments.steps
    figures = train_model(arguments.folder, read_texts(arguments.text), steps)
    print({name: value for name, value in figures.items() if name != "settings"})


if __name__ == "__main__":
    main()
