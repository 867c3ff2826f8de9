"""What comes from elsewhere is data: a checkpoint, a tokenizer or a shard that somebody has laid a trap in runs nothing.

(A trap in the state of a training: tests/llada/training/checkpoint/test_metadata.py.)
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llada
from llada.data.tokens.manifest import write_index
from llada.data.tokens.packing import concatenate_and_cut
from llada.data.tokens.shards import UNIGRAM_COUNTS, TokenDataset, load_unigram_counts, write_shard
from llada.errors import UserError
from llada.model.hf import save_model
from llada.model.transformer import ModelConfig, Transformer
from llada.tokenizer import TemplateRefusalError, load_tokenizer, render_chat, save_tokenizer, train_tokenizer


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.fixture
def sprung(tmp_path: Path) -> Any:
    """The file that a trap makes; it must not be there at the end."""
    yield tmp_path / "sprung"
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    tokenizer = train_tokenizer(["One, two, three."] * 5, 300)
    config = ModelConfig(len(tokenizer), 16, 1, 2, 32, max_length=64, mask_token_id=tokenizer.mask_token_id)
    model = Transformer(config)
    model.init_weights(0)
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_weights_that_are_a_pickle_are_refused(checkpoint: Path, sprung: Path, name: str):
    (checkpoint / "model.safetensors").unlink()
    torch.save({"model": Trap(sprung)}, checkpoint / name)
    with pytest.raises(UserError):
        llada.load(checkpoint)


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_code_beside_the_weights_is_not_run(checkpoint: Path, golden_dir: Path, tmp_path: Path, sprung: Path):
    """As official folders have it, for those who trust it."""
    official = tmp_path / "official"
    shutil.copytree(golden_dir / "llada_gqa", official)
    for folder, name in (
        (official, "modeling_llada"),
        (official, "configuration_llada"),
        (checkpoint, "evil"),
    ):
        (folder / f"{name}.py").write_text(f"import pathlib\npathlib.Path({str(sprung)!r}).touch()\n")
    assert json.loads((official / "config.json").read_text())["auto_map"]["AutoModel"].startswith(
        "modeling_llada."
    )
    model, _ = llada.load(official)
    assert model(torch.zeros(1, 4, dtype=torch.int64)).shape[:2] == (1, 4)
    auto_map = {"AutoTokenizer": [None, "evil.Tokenizer"]}
    edit(checkpoint / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Tokenizer")
    _, tokenizer = llada.load(checkpoint)
    assert tokenizer("One, two")["input_ids"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch FILE') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__()[0].__init__.__globals__ }}",
        "{{ messages.append({'role': 'user', 'content': 'more'}) }}",
    ],
)
def test_a_chat_template_reaches_nothing(checkpoint: Path, sprung: Path, template: str):
    for file in checkpoint.glob("chat_template*"):
        file.unlink()
    edit(checkpoint / "tokenizer_config.json", chat_template=template.replace("FILE", str(sprung)))
    with pytest.raises(TemplateRefusalError):
        render_chat(load_tokenizer(checkpoint), [{"role": "user", "content": "Hello"}])


def test_a_tokenizer_that_is_a_pickle_is_refused(checkpoint: Path, sprung: Path):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (checkpoint / name).write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(UserError):
        load_tokenizer(checkpoint)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A prepared folder of one row."""
    folder = tmp_path / "data"
    row = concatenate_and_cut([np.arange(8, dtype=np.uint32)], 8, 0)
    write_index(f"{folder}/train.parquet", [write_shard(str(folder), "train", "0", row)])
    splits = {"train": {"rows": 1, "tokens": 8, "indexes": ["train.parquet"]}}
    dataset = {"kind": "pretrain", "row_length": 8, "splits": splits}
    (folder / "manifest.json").write_text(json.dumps({"dataset": dataset}))
    assert TokenDataset(str(folder)).rows(np.array([0])).tokens.shape == (1, 8)
    return folder


def _shard(folder: Path, trap: Trap) -> None:
    (folder / "train/0.safetensors").write_bytes(pickle.dumps(trap))
    TokenDataset(str(folder)).rows(np.array([0]))


def _list(folder: Path, trap: Trap) -> None:
    (folder / "train.parquet").write_bytes(pickle.dumps(trap))
    TokenDataset(str(folder))


def _counts(folder: Path, trap: Trap) -> None:
    np.save(folder / UNIGRAM_COUNTS, np.array([trap], dtype=object), allow_pickle=True)
    load_unigram_counts(str(folder))


@pytest.mark.parametrize("read", [_shard, _list, _counts])
def test_data_that_are_a_pickle_are_refused(data: Path, sprung: Path, read: Callable[[Path, Trap], None]):
    with pytest.raises(UserError):
        read(data, Trap(sprung))
