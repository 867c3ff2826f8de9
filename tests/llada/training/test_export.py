"""The exported folder: of any number of files, of the chosen precision, at any URL, and complete only at its end.

What several workers export is in test_parallel.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors import safe_open

from llada.model import hf
from llada.model.hf import load_model
from llada.model.transformer import Transformer
from llada.training import export
from llada.training.export import export_weights


@pytest.fixture
def network(make_config: Callable) -> Transformer:
    model = Transformer(make_config()[0])
    model.init_weights(0)
    return model


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [None, 1500])
def test_the_folder_loads_as_the_network(
    make_config: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tied: bool,
    shard_bytes: int | None,
) -> None:
    if shard_bytes is not None:
        monkeypatch.setattr(hf, "SHARD_BYTES", shard_bytes)
    model = Transformer(make_config(tie_embeddings=tied)[0])
    if tied:
        model.lm_head.weight = model.embed.weight
    model.init_weights(0)
    export_weights(str(tmp_path), weights(model), model.config, dtype=dtype, end_ids=(0, 5))
    loaded = load_model(tmp_path)
    assert loaded.end_ids == (0, 5)
    assert loaded.config == model.config
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).to(dtype)), name
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == (1 if shard_bytes is None else int(files[0].name.split("-of-")[1][:5]))


def test_no_file_is_held_longer_than_until_it_is_written(
    network: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors are gathered in the order of the files, those of one file between two writes."""
    monkeypatch.setattr(hf, "SHARD_BYTES", 3000)  # a block has 7 kB
    taken: list[str] = []
    gather, write = export.full_tensor, export.write_weights

    def note(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        taken.append("tensor")
        return gather(tensor, **options)

    def note_file(file: hf.WeightFile, *rest: Any) -> None:
        taken.append(f"{len(file.names)} written")
        write(file, *rest)

    monkeypatch.setattr(export, "full_tensor", note)
    monkeypatch.setattr(export, "write_weights", note_file)
    export_weights(str(tmp_path), weights(network), network.config)
    held = 0
    for step in taken:
        held = held + 1 if step == "tensor" else held - int(step.split()[0])
        assert held == 0 or step == "tensor"
    assert len([step for step in taken if step != "tensor"]) > 3
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            sizes = [handle.get_tensor(name).nbytes for name in handle.keys()]  # noqa: SIM118
        assert sum(sizes) <= 3000 or len(sizes) == 1


def test_a_smaller_checkpoint_replaces_a_larger_one_on_a_store(
    network: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No index of the earlier one is left, which names files with other weights."""
    fs, url = fsspec.filesystem("memory"), f"memory://{tmp_path.name}"
    with monkeypatch.context() as small:
        small.setattr(hf, "SHARD_BYTES", 1500)
        export_weights(url, weights(network), network.config, end_ids=(1, 2))
    assert fs.exists(f"{url}/model.safetensors.index.json")
    export_weights(url, weights(network), network.config)
    assert not fs.exists(f"{url}/model.safetensors.index.json")
    fs.get(url, str(tmp_path / "copy"), recursive=True)
    tokens = torch.arange(10)[None]
    assert torch.equal(load_model(tmp_path / "copy")(tokens), network(tokens))


def test_a_place_that_takes_no_files_is_named(network: Transformer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Exception, match="in the way"):
        export_weights(str(tmp_path / "file"), weights(network), network.config)
