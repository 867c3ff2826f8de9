"""The tokenizer of a corpus: a given one, or one that is trained on a sample of its first snapshot."""

from __future__ import annotations

import hashlib
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial

from transformers import PreTrainedTokenizerFast

from llada.data.prepare import sample_unit
from llada.data.work.config import PrepareConfig
from llada.data.work.job import Job
from llada.data.work.tasks import TokenizerSample
from llada.errors import UserError
from llada.files import file_sizes, join, read_bytes
from llada.tokenizer import ensure_special_tokens, load_tokenizer, save_tokenizer, train_tokenizer
from pipelines.corpus.finish import all_left_out
from pipelines.runners.tasks import TaskRun
from pipelines.stage.artifact import Input, fetch_folder, put_folder

_LAST_FILE = "tokenizer_config.json"  # put_folder goes by name, so this one is written last
_SHOWN_CHARS = 300
_MAX_SAMPLED_UNITS = 1000


def given_tokenizer(config: PrepareConfig) -> list[Input]:
    """The inputs of the stage (see `open_output`) beside its text: the tokenizer, when it is given.

    Raises UserError when there is none at its place, or neither a place nor a size to train one of is given.
    """
    url = config.tokenizer
    if url is None:
        if config.train_tokenizer_vocab is None:
            raise UserError("give a tokenizer's folder (tokenizer), or train one (train_tokenizer_vocab)")
        return []
    try:
        digest = hashlib.sha256(read_bytes(join(url, "tokenizer.json"))).hexdigest()
    except FileNotFoundError:
        raise UserError(f"no tokenizer.json in {url}; name a tokenizer's folder, or train one") from None
    return [{"url": url, "id": "tokenizer " + digest[:16]}]


def settle_tokenizer(run: TaskRun, job: Job) -> tuple[PreTrainedTokenizerFast, str]:
    """The tokenizer in the output, put there first unless an earlier run did, and a hash of its files."""
    config, url = job.config, job.tokenizer_url
    if _LAST_FILE not in file_sizes(url):
        if config.tokenizer is not None:
            tokenizer = ensure_special_tokens(load_tokenizer(fetch_folder(config.tokenizer)))
        else:
            tokenizer = train_tokenizer(_sample(run, job), config.train_tokenizer_vocab or 0)
        with tempfile.TemporaryDirectory() as local:
            save_tokenizer(tokenizer, local)
            put_folder(local, url)
    files = {name: read_bytes(join(url, name)) for name in sorted(file_sizes(url))}
    content = b"".join(name.encode() + b"\0" + data for name, data in files.items())
    return load_tokenizer(fetch_folder(url)), hashlib.sha256(content).hexdigest()[:16]


def _sample(run: TaskRun, job: Job) -> Iterator[str]:
    """Texts from evenly spread units, in the order of the units."""
    numbers = range(0, job.plan.units, max(1, job.plan.units // _MAX_SAMPLED_UNITS))
    budget = math.ceil(job.config.tokenizer_sample_bytes / len(numbers))
    task = partial(sample_unit, job, budget_bytes=budget)
    samples: dict[int, TokenizerSample] = dict(run.map("sample", task, numbers))
    texts = [text for number in numbers for text in samples[number]["texts"]]
    if not texts:
        lost = sum((Counter(sample["lost"]) for sample in samples.values()), Counter[str]())
        first = next((example for sample in samples.values() for example in sample["examples"]), None)
        raise UserError(
            "nothing to train a tokenizer on: no usable document in the train split (left out: "
            + all_left_out(lost, job.plan.left_out)
            + (
                f"; first: {first['source']} line {first['line']}: {' '.join(first['text'].split())[:_SHOWN_CHARS]}"
                if first
                else ""
            )
            + ")"
        )
    if run.progress:
        print(f"training a tokenizer on {sum(map(len, texts)):,} characters", file=sys.stderr)
    yield from texts
