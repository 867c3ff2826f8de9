"""The elements of the report (whole pages: test_page.py)."""

from llada.data.report.html import Markup, cell, format_bytes, format_number, join, tag


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", "a < b", Markup("<br>")) == "<p>a &lt; b<br></p>"
    assert tag("a", "x", href='"', class_="y") == '<a href="&quot;" class="y">x</a>'
    assert join("&", 1) == "&amp;1"


def test_sizes_have_three_digits() -> None:
    sizes = (0, 999, 999.6, 1000, 65_432, 999_499, 999_600, 7.5e12, 2.5e18)
    assert [format_bytes(size) for size in sizes] == [
        "0 bytes", "999 bytes", "1.00 kB", "1.00 kB", "65.4 kB", "999 kB", "1.00 MB", "7.50 TB", "2.50e+03 PB",
    ]  # fmt: skip


def test_cells_and_numbers_are_short() -> None:
    assert cell("x" * 300) == "x" * 199 + "…"
    assert [format_number(value) for value in (1234567, 0.123456, "text")] == ["1,234,567", "0.1235", "text"]
