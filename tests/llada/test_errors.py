"""UserError travels between processes, and a hint names the nearest."""

from __future__ import annotations

import pickle

from llada.errors import UserError, hint


def test_the_hint_names_the_nearest_or_all() -> None:
    assert hint("lerning_rate", ["learning_rate", "seed"]) == "did you mean 'learning_rate'?"
    assert hint("xyz", ["learning_rate", "seed"]) == "known: learning_rate, seed"
    assert hint(3, []) == "known: "


def test_a_hint_among_many_stays_short_and_is_the_same_each_time() -> None:
    many = [f"{n:05}" for n in range(10_000)]
    assert hint("xyz", many) == f"known: {', '.join(many[:30])} and 9,970 more"
    assert hint("xyz", many, shown=2) == "known: 00000, 00001 and 9,998 more"
    assert hint("lerning_rate", [*many, "learning_rate"]) == "did you mean 'learning_rate'?"
    assert hint("xyz", set(many[:30])) == f"known: {', '.join(many[:30])}"


def test_a_user_error_survives_a_process() -> None:
    error = pickle.loads(pickle.dumps(UserError("a: b, do c")))
    assert isinstance(error, UserError)
    assert str(error) == "a: b, do c"
