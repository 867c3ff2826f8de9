"""The elements of an HTML report: text is escaped unless it is Markup, so nothing from the data becomes HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

_MAX_CELL_CHARS = 200


class Markup(str):
    """HTML; every other string is text, and escaped when it becomes part of the page."""


def page(title: str, *content: object) -> str:
    """A whole document, to be stored in UTF-8: no script and no other file."""
    head = join(
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Markup(_STYLE)),
    )
    body = tag("html", tag("head", head), "\n", tag("body", tag("h1", title), *content), lang="en")
    # Names of files may hold half surrogate pairs: bytes that were no UTF-8.
    return f"<!doctype html>\n{body}\n".encode("utf-8", "replace").decode()


def tag(name: str, *content: object, **attributes: object) -> Markup:
    """An element. `class_` is the attribute class, `aria_label` aria-label."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{name}{written}>{join(*content)}</{name}>")


def join(*content: object) -> Markup:
    return Markup("".join(c if isinstance(c, Markup) else html.escape(str(c), quote=False) for c in content))


def note(text: str) -> Markup:
    return tag("p", text, class_="note")


def warning(text: str) -> Markup:
    return tag("p", text, class_="warning")


def details(title: object, *content: object, is_open: bool = False) -> Markup:
    return tag("details", tag("summary", title), *content, **({"open": ""} if is_open else {}))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], align: str) -> Markup:
    """`align`: a letter per column: l(eft), r(ight) for numbers, b(ar)."""
    top = tag("tr", *(tag("th", name, class_=side) for name, side in zip(head, align, strict=True)))
    body = [
        tag("tr", *(tag("td", c, class_=side) for c, side in zip(row, align, strict=True))) for row in rows
    ]
    # What can be scrolled must be reached by the keyboard too.
    return tag("div", tag("table", tag("thead", top), tag("tbody", *body)), class_="scroll", tabindex=0)


def terms(entries: Mapping[str, object]) -> Markup:
    """A list of names and what they stand for."""
    return tag(
        "dl", *(join(tag("dt", name), tag("dd", value)) for name, value in entries.items()), class_="terms"
    )


def cell(value: object) -> str:
    """Text from the data, not too long for a table."""
    text = str(value)
    return text if len(text) <= _MAX_CELL_CHARS else text[: _MAX_CELL_CHARS - 1] + "…"


def format_count(number: float) -> str:
    return f"{number:,.0f}"


def _short(number: float) -> str:
    """Three digits: 950, 12.0k, 3.40M."""
    return _three_digits(number, ("", "k", "M", "G", "T"))


def _power(k: int) -> str:
    """2^k in binary units, as lengths and contexts are given: 512, 1k, 2k."""
    return f"{2 ** (k % 10)}{('', 'k', 'M', 'G', 'T')[k // 10]}"


def format_bytes(number: float) -> str:
    """Three digits, in decimal units."""
    return _three_digits(number, (" bytes", " kB", " MB", " GB", " TB", " PB"))


def _three_digits(number: float, units: Sequence[str]) -> str:
    """Of the units, each 1000 times the one before; whole numbers in the first."""
    thousands = 0
    while number >= 999.5 and thousands < len(units) - 1:
        number, thousands = number / 1000, thousands + 1
    digits = f"{number:#.3g}".rstrip(".") if thousands else f"{number:.0f}"
    return digits + units[thousands]


def format_share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def format_dollars(amount: float) -> str:
    return f"${amount:,.0f}"


def format_number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return format_count(value) if isinstance(value, int) else cell(value)


def histogram(counts: Mapping[str, int], of: str = "documents") -> Markup:
    """Bars of {k: documents, or what `of` says, of a length from 2^k to 2^(k+1) - 1}, which must not be empty."""
    bins = range(min(map(int, counts)), max(map(int, counts)) + 1)
    highest, width, height = max(counts.values()), 40, 150
    bars: list[object] = []
    for place, k in enumerate(bins):
        number = counts.get(str(k), 0)
        tall, x = height * number / highest, place * width
        title = tag("title", f"{_power(k)} to {_power(k + 1)}: {format_count(number)} {of}")
        bars.append(
            tag("rect", title, x=x + 2, y=f"{20 + height - tall:.1f}", width=width - 4, height=f"{tall:.1f}")
        )
        if number:
            bars.append(tag("text", _short(number), x=x + width // 2, y=f"{15 + height - tall:.1f}"))
        bars.append(tag("text", _power(k), x=x, y=height + 38, class_="axis"))
    bars.append(tag("text", _power(bins[-1] + 1), x=len(bins) * width, y=height + 38, class_="axis"))
    box = f"-20 0 {len(bins) * width + 40} {height + 45}"
    label = f"{of.capitalize()} by powers of two, from {_power(bins[0])} to {_power(bins[-1] + 1)}"
    return tag(
        "svg",
        *bars,
        viewBox=box,
        style=f"max-width: {len(bins) * width + 40}px",
        role="img",
        aria_label=label,
    )


def funnel_picture(levels: Sequence[tuple[str, int]]) -> Markup:
    """What is left of a number after each of some steps: (step, number) from the widest level on, centred bars."""
    whole, width, height = max(levels[0][1], 1), 400, 40
    shapes: list[object] = []
    above = 1.0
    for place, (name, number) in enumerate(levels):
        share, top = number / whole, place * height
        if place:
            slope = [(above, top - 8), (share, top + 18)]
            left = " ".join(f"{width / 2 * (1 - wide):.1f},{y}" for wide, y in slope)
            right = " ".join(f"{width / 2 * (1 + wide):.1f},{y}" for wide, y in reversed(slope))
            shapes.append(tag("polygon", points=f"{left} {right}"))
        rect = {"x": f"{width / 2 * (1 - share):.1f}", "width": f"{width * share:.1f}"}
        shapes.append(tag("rect", **rect, y=top + 18, height=14))
        shapes.append(tag("text", name, x=0, y=top + 13, class_="start"))
        shapes.append(
            tag("text", f"{format_count(number)} · {number / whole:.1%}", x=width, y=top + 13, class_="end")
        )
        above = share
    label = ", ".join(f"{name}: {format_count(number)}" for name, number in levels)
    return tag(
        "svg",
        *shapes,
        viewBox=f"0 0 {width} {len(levels) * height}",
        style="max-width: 480px",
        role="img",
        aria_label=label,
    )


def bar(share: float) -> Markup:
    """A horizontal bar for a share of the width, 0 to 1."""
    rect = tag("rect", width=f"{100 * share:.2f}%", height="100%")
    return tag("svg", rect, class_="bar", role="img", aria_label=f"{share:.1%}")


_STYLE = """
  :root { color-scheme: light dark; --bg: light-dark(#fbfaf8, #17181a); --fg: light-dark(#1d1d1f, #e9e8e6);
    --dim: light-dark(#6b6a68, #9b9a97); --line: light-dark(#dddad4, #34363a); --box: light-dark(#fff, #1f2124);
    --accent: light-dark(#1c6b5a, #6fcab2); --mark: light-dark(#f6e3a8, #5c4d1a); --warn: light-dark(#b4561c, #e39a5f);
    --gone: light-dark(#a33a2a, #e58f80); --shade: light-dark(#0003, #fff3); }
  * { box-sizing: border-box; }
  body { max-width: 72rem; margin: 0 auto; padding: 2rem 1.25rem 6rem; background: var(--bg); color: var(--fg);
    font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
  h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
  h2 { font-size: 1.15rem; margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
  h3 { font-size: .95rem; margin: 1.5rem 0 .5rem; }
  h4 { font-size: .8rem; margin: 0 0 .25rem; font-weight: 500; color: var(--dim); }
  a { color: var(--accent); }
  nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .875rem; }
  .note { color: var(--dim); font-size: .85rem; margin: .5rem 0; max-width: 60rem; overflow-wrap: anywhere; }
  .figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1.25rem 2rem; margin: 0; }
  .figures dt { color: var(--dim); font-size: .85rem; }
  .figures dd { margin: 0; font-size: 1.6rem; line-height: 1.25; }
  .figures dd.note { font-size: .85rem; }
  .columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 0 2rem; }
  .terms { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: 0 0 1.5rem;
    font-size: .875rem; }
  .terms dt { color: var(--dim); }
  .terms dd { margin: 0; overflow-wrap: anywhere; }
  .scroll { overflow-x: auto; background:
    linear-gradient(to right, var(--bg) 1rem, transparent 2rem) local,
    linear-gradient(to left, var(--bg) 1rem, transparent 2rem) local,
    linear-gradient(to right, var(--shade), transparent .75rem) scroll,
    linear-gradient(to left, var(--shade), transparent .75rem) scroll; }
  table { border-collapse: collapse; font-size: .875rem; margin: .5rem 0; }
  th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
  th { color: var(--dim); font-weight: 500; vertical-align: bottom; }
  td.l { overflow-wrap: anywhere; min-width: 8.5rem; }
  .r { text-align: right; white-space: nowrap; }
  th.r { white-space: normal; }
  .b { width: 22rem; min-width: 8rem; vertical-align: middle; }
  td code { white-space: nowrap; }
  code { font: .92em ui-monospace, monospace; }
  svg { display: block; width: 100%; }
  svg.bar { height: .8rem; }
  rect { fill: var(--accent); }
  polygon { fill: var(--accent); opacity: .15; }
  svg text { font-size: 11px; text-anchor: middle; fill: var(--fg); }
  svg text.axis { fill: var(--dim); }
  svg text.start { text-anchor: start; font-size: 12px; }
  svg text.end { text-anchor: end; font-size: 12px; }
  figure { margin: 0; }
  figcaption { font-size: .875rem; margin-bottom: .5rem; }
  details { margin: .4rem 0; }
  summary { cursor: pointer; padding: .2rem 0; overflow-wrap: anywhere; }
  article { margin: .5rem 0 1.25rem 1rem; }
  .text { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--box); border: 1px solid var(--line);
    border-radius: .4rem; padding: .6rem .8rem; font-size: .875rem; unicode-bidi: isolate; }
  .warning { border-left: .25rem solid var(--warn); padding: .3rem .8rem; margin: .75rem 0; max-width: 60rem;
    background: var(--box); overflow-wrap: anywhere; }
  mark { background: var(--mark); color: inherit; }
  del { color: var(--gone); text-decoration: line-through; }
  ul { margin: .25rem 0; padding-left: 1.25rem; overflow-wrap: anywhere; }
  @media (max-width: 40rem) {
    body { padding: 1.25rem 1rem 4rem; }
    h1 { font-size: 1.25rem; overflow-wrap: anywhere; }
    table { font-size: .8rem; }
    th, td { padding-right: .7rem; }
    article { margin-left: .25rem; }
    .b { width: 8rem; }
  }
"""
