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

from llada.data.read.http_body import utf_16_kind
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
# Of alphabets that ASCII is a part of.
_LATIN = frozenset(
    ["cp1250", "cp1252", "cp1254", "cp1257", "cp1258", "mac-roman", "cp437", "cp850"]
    + [f"iso8859-{number}" for number in (1, 2, 3, 4, 9, 10, 13, 14, 15, 16)]
)
_BEYOND_ASCII = re.compile("[^\\x00-\\x7f\\xa0]")
_NEVER_TEXT = re.compile("[\\x80-\\x9f\ufffd\ue000-\uf8ff]")
_LATIN_RUN = re.compile("[\\xc0-\\xd6\\xd8-\\xf6\\xf8-\u024f]{4,}")
_SIGN, _LETTER = "[\\xa2-\\xaa\\xac-\\xba\\xbc-\\xbe\u201a\u0192]", "[\\xc0-\\xd6\\xd8-\\xf6\\xf8-\xff]"
_SIGN_IN_WORD = re.compile(f"{_SIGN}{_LETTER}|{_LETTER}{_SIGN}")
_TWO_ALPHABETS = re.compile("[A-Za-z][\u0370-\u06ff\u0e00-\u0e7f]|[\u0370-\u06ff\u0e00-\u0e7f][A-Za-z]")
_INVERTED_WORD = re.compile("[\u0430-\u045f][\u0400-\u042f]{2,}")  # koi8-r has capitals where cp1251 has none
_META = re.compile(
    rb"<(?:meta|\?xml)\b[^>]{0,300}?\b(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.IGNORECASE
)
_META_BYTES = 1 << 14
_FEW = 0.1

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

    In this order: UTF-16 by its mark or its zeros, UTF-8 when all bytes are valid UTF-8 or nearly all (other encodings
    practically never are, while declarations often lie), `charset` as the HTTP header says, the <meta> declaration, a
    statistical guess. Of the last three the first is taken that gives no nonsense; and the latter two, where they agree,
    outvote the header: many servers send one that nobody has chosen.
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    if wide := utf_16_kind(data):
        return data.decode(wide, "replace").removeprefix("\ufeff")
    declared = _codec(charset)
    if declared not in _STATEFUL:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            text = data.decode("utf-8", "replace")
        # Every character of several bytes makes the text shorter than its bytes.
        if text.count("\ufffd") < _FEW * (len(data) - len(text)):
            return text
    try:
        from resiliparse.parse.encoding import detect_encoding
    except ImportError:
        raise UserError(_missing("resiliparse")) from None
    meta = _META.search(data, 0, _META_BYTES)
    named, guessed = _codec(meta[1].decode("ascii")) if meta else None, _codec(detect_encoding(data))
    order = [named, declared, guessed] if named == guessed else [declared, named, guessed]
    others = ["utf-8"] if guessed else ["cp949", "utf-8"]  # Korean is never guessed
    best, least = "", 2.0
    for codec in dict.fromkeys(filter(None, [*order, *others])):
        text = data.decode(codec, "replace")
        share = _nonsense(text, codec)
        if share < least:
            best, least = text, share
        if least < _FEW:
            break
    return best


def _nonsense(text: str, codec: str) -> float:
    """The share of the characters beyond ASCII that show that a text is in another encoding than `codec`."""
    beyond = len(_BEYOND_ASCII.findall(text))
    # One word in ten begins with a capital.
    strange = len(_NEVER_TEXT.findall(text)) + 3 * sum(map(len, _INVERTED_WORD.findall(text)))
    if (
        codec in _LATIN
    ):  # its letters stand between those of ASCII; other alphabets, read in it, are words of them
        strange += sum(map(len, _LATIN_RUN.findall(text))) + 2 * len(_SIGN_IN_WORD.findall(text))
    else:
        strange += len(_TWO_ALPHABETS.findall(text))
    return min(1.0, strange / beyond) if beyond else 0.0


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
