"""The settings of a fine-tuning, and their limits."""

from __future__ import annotations

import pytest

from llada.errors import UserError
from llada.settings import from_dict
from llada.understanding.config import UnderstandingConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "max"}, "pooling must be one of mean, first, last, not 'max'"),
        ({"target": "number"}, "target must be one of class, score"),
        ({"warmup_fraction": 1.5}, "warmup_fraction must be at most 1"),
        ({"max_length": 3}, "max_length must be at least 4"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"lable_field": "x"}, "unknown setting lable_field; did you mean 'label_field'"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        UnderstandingConfig(**settings) if "lable_field" not in settings else from_dict(
            UnderstandingConfig, settings
        )  # type: ignore[arg-type]
