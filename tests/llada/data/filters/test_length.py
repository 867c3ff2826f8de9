"""llada/data/filters/length.py"""

import pytest

from llada.data.document import Document
from llada.data.filters.length import LengthLimits
from llada.data.filters.view import TextView


@pytest.mark.parametrize(
    ("text", "low", "high", "verdict"),
    [
        ("ab", 1, None, None),
        ("ab", 2, 2, None),
        ("", 1, None, ("too_short", 0, None)),
        ("abc", 1, 2, ("too_long", 3, None)),
    ],
)
def test_length_limits(text, low, high, verdict):
    document = Document(text)
    assert LengthLimits(low, high)(document, TextView(text)) == (document, verdict, {})
