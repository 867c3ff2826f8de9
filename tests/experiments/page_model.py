"""The model that the pictures of the endpoint's page are taken with: it tells how a children's story begins.

    python tests/experiments/page_model.py --text FOLDER --output FOLDER [--steps N]

It learns the first sentences of 48 stories of FOLDER/tinystories.txt by heart, as answers to "Tell me a story about a …"
and as plain text (1 M parameters, minutes of one core): enough to say something that can be read, and to be unsure
here and there. Nothing is measured with it. --output is then a checkpoint for `llada serve`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from llada.data.tokens.manifest import write_index
from llada.data.tokens.packing import PackedRows, answer_tokens
from llada.data.tokens.shards import write_shard
from llada.diffusion.objective import ObjectiveConfig
from llada.diffusion.time import TimeConfig
from llada.model.hf import save_model
from llada.model.transformer import ModelConfig
from llada.presets import tiny
from llada.tokenizer import encode_texts, render_chat, save_tokenizer, train_tokenizer
from llada.training.events import Event, StepDone
from llada.training.run import RunConfig, TrainConfig
from llada.training.trainer import train

STORIES = 48
MOST_WORDS = 30
VOCABULARY = 1024
ANSWER = 48  # tokens, the end of the text and what is behind it included
ROW_LENGTH = 88
BATCH_ROWS = 16
ABOUT = [
    "dog",
    "cat",
    "bird",
    "boy",
    "girl",
    "ball",
    "car",
    "tree",
    "fish",
    "bear",
    "frog",
    "rabbit",
    "mouse",
    "duck",
    "lion",
    "fox",
    "horse",
    "cow",
    "toy",
    "cake",
    "flower",
    "garden",
    "boat",
    "ship",
    "train",
    "truck",
    "plane",
    "kite",
    "box",
    "book",
    "hat",
    "king",
    "queen",
    "princess",
    "dragon",
    "robot",
    "doll",
    "park",
    "beach",
    "river",
    "forest",
    "house",
    "farm",
    "moon",
    "star",
]


def openings(file: Path) -> list[str]:
    """The first sentences of stories, at most MOST_WORDS words of each."""
    found = []
    for story in file.read_text(encoding="utf-8").split("<|endoftext|>"):
        sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(story.split()))
        opening = sentences[0]
        for sentence in sentences[1:]:
            if len(f"{opening} {sentence}".split()) > MOST_WORDS:
                break
            opening = f"{opening} {sentence}"
        if 12 <= len(opening.split()) <= MOST_WORDS and opening.isascii() and '"' not in opening:
            found.append(opening)
    return found[:STORIES]


def documents(texts: list[str]) -> list[tuple[str | None, str]]:
    """(question, answer), and (None, text)."""
    pairs: list[tuple[str | None, str]] = [(None, text) for text in texts]
    for text in texts:
        named = [word for word in ABOUT if re.search(rf"\b{word}\b", text)]
        pairs += [(f"Tell me a story about a {word}.", text) for word in named[:2]]
    return pairs


def write_rows(
    pairs: list[tuple[str | None, str]], number: int, tokenizer: PreTrainedTokenizerFast, split: str
) -> PackedRows:
    """A document a row, of which the answer is learned, and the ends of the text behind it."""
    source, eos = random.Random(split), tokenizer.eos_token_id
    tokens, segments = [], []
    for _ in range(number):
        question, text = source.choice(pairs)
        before = render_chat(tokenizer, [{"role": "user", "content": question}]) if question else []
        answer = list(encode_texts(tokenizer, [text])[0])[: ANSWER - 1]
        tokens.append((before + answer + [eos] * ROW_LENGTH)[:ROW_LENGTH])
        segments.append((0, len(before), len(before) + ANSWER))
    offsets = np.arange(number + 1).astype(np.uint64)
    return PackedRows(np.array(tokens, np.uint32), np.array(segments, np.uint32), offsets)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="folder with tinystories.txt")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    texts = openings(arguments.text / "tinystories.txt")
    pairs = documents(texts)
    tokenizer = train_tokenizer(texts + [question for question, _ in pairs if question], VOCABULARY)
    data = arguments.output / "data"
    data.mkdir(parents=True, exist_ok=True)
    splits, counts = {}, np.zeros(len(tokenizer), np.int64)
    for split, number in {"train": arguments.steps * BATCH_ROWS, "validation": BATCH_ROWS}.items():
        rows = write_rows(pairs, number, tokenizer, split)
        entry = write_shard(str(data), split, "0", rows)
        write_index(f"{data}/{split}.parquet", [entry])
        splits[split] = {"rows": entry.rows, "tokens": entry.tokens, "indexes": [f"{split}.parquet"]}
        counts += np.bincount(answer_tokens(rows), minlength=len(tokenizer))
    roles = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    dataset = {
        "kind": "pretrain",
        "row_length": ROW_LENGTH,
        "vocab_size": len(tokenizer),
        **roles,
        "splits": splits,
    }
    (data / "manifest.json").write_text(json.dumps({"dataset": dataset}))
    network = ModelConfig(len(tokenizer), 128, 4, 4, 384, max_length=256, rope_theta=100.0, **roles)
    config = RunConfig(
        objective=ObjectiveConfig(time=TimeConfig(density="importance", t_min=0.1, t_max=1.0)),
        optim=tiny().pretrain.optim,
        train=TrainConfig(
            num_steps=arguments.steps,
            global_batch_tokens=BATCH_ROWS * ROW_LENGTH,
            micro_batch_rows=BATCH_ROWS,
            log_every=20,
            validate_every=100_000,
            checkpoint_every=100_000,
        ),
    )

    def report(event: Event) -> None:
        if isinstance(event, StepDone):
            print(
                f"step {event.step:5}  loss {event.loss:.3f}  {event.tokens_per_second:,.0f} tokens/s",
                flush=True,
            )

    result = train(
        network,
        config,
        str(data),
        checkpoints=str(arguments.output / "checkpoints"),
        unigram_counts=counts,
        report=report,
    )
    assert result.model is not None
    save_model(result.model, arguments.output)
    save_tokenizer(tokenizer, arguments.output)


if __name__ == "__main__":
    main()
