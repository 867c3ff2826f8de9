"""UserError travels between processes, and a hint names the nearest."""

from __future__ import annotations

import pickle

from llada.errors import UserError, hint


def test_the_hint_names_the_nearest_or_all() -> None:
    assert hint("lerning_rate", ["learning_rate", "seed"]) == "did you mean 'learning_rate'?"
    assert hint("xyz", ["learning_rate", "seed"]) == "known: learning_rate, seed"
    assert hint(3, []) == "known: "


def test_a_user_error_survives_a_process() -> None:
    error = pickle.loads(pickle.dumps(UserError("a: b, do c")))
    assert isinstance(error, UserError)
    assert str(error) == "a: b, do c"
