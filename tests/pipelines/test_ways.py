"""How many files a reader crosses: from a command to the loss, from a request to the denoising loop, and from a command to the
step that treats a document."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType, FunctionType

import pytest

from llada.data import prepare
from llada.diffusion.objective import objective_loss
from llada.sampling.config import SamplingConfig
from llada.sampling.sampler import commit
from pipelines import prepare as command
from pipelines.pretrain import pretrain_worker
from pipelines.runners.workers import WorkerHooks
from pipelines.serving.dialects.completions import CompletionBody
from pipelines.serving.replica import Denoiser

ROOT = Path(__file__).resolve().parents[2]


def way_to(goal: Callable, run: Callable[[], object]) -> list[str]:
    """Our own files on the stack when `goal` is called first in `run`, in any thread, each where it is entered."""
    way: list[str] = []

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event != "call" or frame.f_code is not goal.__code__ or way:
            return
        caller: FrameType | None = frame
        stack = []
        while caller is not None:
            path = Path(caller.f_code.co_filename)
            if any(path.is_relative_to(ROOT / room) for room in ("llada", "pipelines")):
                stack.append(str(path.relative_to(ROOT)))
            caller = caller.f_back
        way.extend(
            file for file, inner in zip(stack[::-1], [None, *stack[::-1]], strict=False) if file != inner
        )

    before = sys.getprofile()
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
    return way


@pytest.mark.integration
def test_from_the_command_to_the_loss(stages, tmp_path):
    recipe, hooks = stages.recipe, WorkerHooks(lambda event: None, lambda: False, lambda phase: None)
    worker = partial(pretrain_worker, sampling=recipe.sampling)
    way = way_to(
        objective_loss,
        lambda: worker(recipe.model, recipe.pretrain, stages.data, str(tmp_path), None, None, hooks),
    )
    assert way == ["pipelines/pretrain.py", "llada/training/trainer.py", "llada/diffusion/objective.py"]


def test_from_the_command_to_the_step_that_treats_a_document():
    """The command calls the tasks of llada/data/prepare.py, whose steps stand there by name, each of one room."""
    assert {name: getattr(command, name).__module__ for name in ("filter_unit", "pack_unit")} == {
        "filter_unit": "llada.data.prepare",
        "pack_unit": "llada.data.prepare",
    }
    names = [*prepare.before.__code__.co_names, *prepare.after.__code__.co_names]
    steps = [vars(prepare)[name] for name in names if isinstance(vars(prepare).get(name), FunctionType)]
    assert [(step.__name__, step.__module__) for step in steps if step.__name__ != "timed"] == [
        ("read", "llada.data.read.documents"),
        ("clean", "llada.data.read.cleaning"),
        ("filter_documents", "llada.data.filters.chain"),
        ("drop_repeats", "llada.data.dedup.removal"),
        ("encode", "llada.data.tokens.encoding"),
        ("write", "llada.data.tokens.writer"),
    ]


@pytest.mark.integration
def test_from_the_request_to_the_loop(stages):
    def ask() -> None:
        replica = Denoiser(stages.model, SamplingConfig(gen_length=4, steps=4, block_length=4))

        async def read() -> None:
            async for _ in replica.stream(CompletionBody.model_validate({"prompt": "A model"})):
                pass

        asyncio.run(read())
        replica.close()

    way = way_to(commit, ask)
    # Behind pipelines/serving/replica.py, in the engine's own thread.
    assert way == ["llada/sampling/engine.py", "llada/sampling/sampler.py"]
