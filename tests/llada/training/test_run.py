"""A run's settings and data: what does not go together is refused, or warned of, before anything is built."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llada.diffusion.objective import ObjectiveConfig
from llada.diffusion.time import TimeConfig
from llada.errors import UserError
from llada.model.transformer import ModelConfig
from llada.training.optim import OptimConfig
from llada.training.run import TrainConfig, open_splits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 11}, "12 ids.*11 rows"),
        ({"max_length": 8}, "16 tokens.*takes 8"),
        ({"mask_token_id": 2}, "mask id 1.*model 2"),
        ({"mask_token_id": None}, "no mask_token_id"),
        ({"causal": True}, "causal=True"),
        ({"kind": "autoregressive"}, "causal=False"),
        ({"block_length": 4}, "masked_diffusion and model.block_length=4 do not go together"),
        (
            {"kind": "autoregressive", "causal": True, "shift": True},
            "model.shift is for what is learned by masks",
        ),
        ({"kind": "block_diffusion"}, "block_diffusion and model.block_length=None"),
        ({"global_batch_tokens": 100}, "100 is not a multiple.*16"),
        ({"global_batch_tokens": 160_000}, r"\d\d training rows, fewer than the 10,000 .* to \d{3} or less"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_numbers(
    make_config: Callable,
    run_here: Callable,
    pretrain_folder: Any,
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        run_here(make_config(**change), pretrain_folder, tmp_path)


def test_meaningless_run_settings_are_refused() -> None:
    for name in ("global_batch_tokens", "micro_batch_rows", "log_every", "keep_checkpoints", "num_steps"):
        with pytest.raises(UserError, match=f"train: {name} must be at least 1, not 0"):
            TrainConfig(**{name: 0})


NUMBERS = [
    (kind, field.name)
    for kind in (OptimConfig, TrainConfig, ObjectiveConfig, TimeConfig, ModelConfig)
    for field in dataclasses.fields(kind)
    if re.search(r"\b(int|float)\b", str(field.type))
]
SHAPE = {"vocab_size": 12, "d_model": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24}


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_no_number_may_be_infinite_undefined_or_negative(kind: type, name: str) -> None:
    """All of them, whoever is added: only a seed may be negative."""
    pair = {"betas": lambda x: (0.9, x), "drops": lambda x: ((0.5, x),)}.get(name, lambda x: x)
    shape = SHAPE if kind is ModelConfig else {}
    kind(**shape)
    for number in (math.nan, math.inf, -math.inf, *([] if name == "seed" else [-1])):
        with pytest.raises(UserError, match=name):
            kind(**shape | {name: pair(number)})


def test_a_schedule_that_does_not_fit_the_run_is_warned_of_before_it_starts(
    make_config: Callable, pretrain_folder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    open_splits(pretrain_folder.url, *make_config(num_steps=20))
    assert caplog.messages == []
    open_splits(pretrain_folder.url, *make_config(num_steps=6, warmup_steps=9))
    open_splits(pretrain_folder.url, *make_config(num_steps=None, num_epochs=0.5, warmup_steps=4))
    assert [re.sub(" that.*|:.*", "", line) for line in caplog.messages] == [
        "optim.warmup_steps 9 is more than the run's 6 steps",
        "optim.warmup_steps 4 is more than the run's 3 steps",
    ]
