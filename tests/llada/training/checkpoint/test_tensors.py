"""The tensors of a checkpoint: where they are laid out, and what it means that they cannot be read."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llada.model.transformer import Transformer
from llada.training.checkpoint.state import DamagedError
from llada.training.checkpoint.tensors import damage_or_fault, make_slots, write_tensors
from llada.training.optim import build_optimizers


def test_an_absent_store_is_no_damage() -> None:
    """Rights that are missing, say: what was trained must not be trained again because of them."""
    assert isinstance(damage_or_fault("step-1", FileNotFoundError(2, "No such file")), DamagedError)
    for error in (PermissionError(13, "denied"), ConnectionResetError(104, "reset"), MemoryError()):
        assert not isinstance(damage_or_fault("step-1", error), DamagedError)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_is_laid_out_as_the_optimizer_lays_it_out(make_config: Callable, optimizer: str) -> None:
    """Of the same shapes and types, and where the parameter is: a fused AdamW refuses a step that is counted elsewhere."""
    config, run = make_config(optimizer=optimizer)

    def build(device: str) -> tuple[Transformer, list[torch.optim.Optimizer]]:
        with torch.device(device):
            model = Transformer(config)
        return model, build_optimizers(model, run.optim)

    model, optimizers = build("cpu")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for own in optimizers:
        own.step()
    stored = {
        f"optim.{name}.{slot}": SimpleNamespace(size=value.shape)
        for name, parameter in model.named_parameters()
        for own in optimizers
        for slot, value in own.state.get(parameter, {}).items()
    }
    assert stored
    for device in ("cpu", "meta"):
        empty_model, empty = build(device)
        make_slots(empty_model, empty, stored)
        for name, parameter in empty_model.named_parameters():
            for own, theirs in zip(empty, optimizers, strict=True):
                made = theirs.state.get(model.get_parameter(name), {})
                laid_out = own.state.get(parameter, {})
                assert {slot: (x.shape, x.dtype) for slot, x in laid_out.items()} == {
                    slot: (x.shape, x.dtype) for slot, x in made.items()
                }
                assert all(x.device == parameter.device for x in laid_out.values())


def test_writing_does_not_wait_for_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one, DCP's writer would sync with it before each tensor of some size: with all that the steps beside it
    have queued there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for step, folder in enumerate((str(tmp_path), f"memory://{tmp_path.name}")):
        files = write_tensors(folder, step, {"model.embed.weight": torch.ones(1 << 10, 1 << 10)})
        assert {".metadata", "__0_0.distcp"} <= set(files)
