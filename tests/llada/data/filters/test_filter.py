"""llada/data/filters/filter.py: what a filter gets without saying anything, and its example."""

import textwrap

import pytest

from llada.data.document import Document
from llada.data.filters import filter as module
from llada.data.filters.view import TextView


def test_the_example_of_the_docstring_is_a_filter():
    names = dict(vars(module))
    exec("from dataclasses import dataclass\n" + textwrap.dedent(module.__doc__.split("\n\n", 1)[1]), names)
    shouting = names["Shouting"](max_capitals=0.25)
    assert shouting(Document("Abcd"), TextView("Abcd")).verdict is None
    assert shouting(Document("ABcd"), TextView("ABcd")).verdict == ("shouting.capitals", 0.5, 0.25)
    assert shouting.files() == []
    assert shouting.redact("a text") == "a text"
    assert shouting.problem() is None


def test_a_filter_must_decide():
    class Undecided(module.Filter):
        label = "Undecided"

    with pytest.raises(TypeError, match="abstract"):
        Undecided()
