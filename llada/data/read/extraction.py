"""The main text of an HTML page.

resiliparse is the default: on the sample of tests/benchmarks/extraction.py it is seven times faster per core than
trafilatura (the setting of FineWeb: precision, no comments) and keeps 99 % of the words that keeps, with more of the
headings and lists. DCLM (arXiv 2406.11794) found models trained on either to be equally good. Its one oddity: lists
with bullets that stand directly in the page's outermost elements are taken for menus.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import Literal, get_args

from llada.errors import UserError

Extractor = Literal["resiliparse", "trafilatura"]

# 7-bit encodings whose bytes are valid UTF-8 too.
_STATEFUL = {"iso2022_jp", "hz", "iso2022_kr"}


# What these labels mean by the WHATWG Encoding Standard.
_SUPERSETS = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}

_TAG = re.compile(r"<(/?)([a-zA-Z][^\s/<>]*)([^<>]*)>")
# Elements without an end, or whose end is implied by the next one: they do not nest when it is missing.
_ENDLESS = frozenset(
    ["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track",
     "wbr", "a", "body", "colgroup", "dd", "dt", "head", "html", "li", "optgroup", "option", "p", "rp", "rt",
     "tbody", "td", "tfoot", "th", "thead", "tr"]
)  # fmt: skip
_MAX_DEPTH = 1000  # browsers stop at 512


def decode_html(data: bytes, charset: str | None = None) -> str:
    """The characters of an HTML page; bytes that mean nothing become U+FFFD.

    In this order: byte order mark, UTF-8 when all bytes are valid UTF-8 (other encodings practically never are, while
    declarations often lie), `charset` as the HTTP header says, the <meta> declaration, a statistical guess.
    """
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace")
    declared = _codec(charset)
    if declared not in _STATEFUL:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            pass
    if declared is None:
        try:
            from resiliparse.parse.encoding import detect_encoding
        except ImportError:
            raise UserError(_missing("resiliparse")) from None
        declared = _codec(detect_encoding(data, from_html_meta=True)) or _codec(detect_encoding(data))
    return data.decode(declared or "utf-8", "replace")


def _codec(charset: str | None) -> str | None:
    """Python's name of an encoding as browsers read it; None for what is none, and for UTF-8, by now ruled out."""
    try:
        name = codecs.lookup((charset or "").strip("\"' ")).name
        "".encode(name)  # Python's codecs include rot13
    except LookupError:
        return None
    return None if name == "utf-8" else _SUPERSETS.get(name, name)


def extract_text(html: str, extractor: Extractor = "resiliparse") -> str:
    """The main content as plain text, one line a paragraph or heading; "" when the page has none.

    Navigation, forms, comments and the texts of images are left out. Raises what `text_extractor` and its function do.
    """
    return text_extractor(extractor)(html)


def text_extractor(extractor: Extractor) -> Callable[[str], str]:
    """The function behind `extract_text`; it raises ValueError for a page that cannot be read.

    Raises UserError when the extractor is not installed, or there is no such.
    """
    if extractor == "resiliparse":
        try:
            from resiliparse.extract.html2text import extract_plain_text
        except ImportError:
            raise UserError(_missing("resiliparse")) from None

        def by_resiliparse(html: str) -> str:
            # Its time is quadratic in the depth: 2 s at 8,000, hours for a hostile page.
            if _depth(html) > _MAX_DEPTH:
                raise ValueError(f"the HTML elements are nested more than {_MAX_DEPTH} deep")
            return extract_plain_text(
                html,
                preserve_formatting=True,
                main_content=True,
                alt_texts=False,
                comments=False,
                post_meta=False,
            ).strip()

        return by_resiliparse
    if extractor == "trafilatura":
        try:
            from trafilatura import extract
        except ImportError:
            raise UserError(_missing("trafilatura lxml_html_clean")) from None
        # Without its deduplication, whose result depends on the pages seen before.
        return lambda html: extract(html, favor_precision=True, include_comments=False) or ""
    raise UserError(f"no extractor {extractor!r}; choose one of {', '.join(get_args(Extractor))}")


def _depth(html: str) -> int:
    """How deep the elements are nested, about; 0 when there are too few to matter."""
    if html.count("<") <= _MAX_DEPTH:
        return 0
    depth = deepest = 0
    for closing, name, attributes in _TAG.findall(html):
        if attributes.endswith("/") or name.lower() in _ENDLESS:
            continue
        depth = max(0, depth - 1) if closing else depth + 1
        deepest = max(deepest, depth)
    return deepest


def _missing(packages: str) -> str:
    return f"extracting text from HTML this way needs other packages: pip install {packages}"
