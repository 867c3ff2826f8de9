"""Detokenisers: how the published zero-shot perplexities undo the tokenisation that their data sets were released in.

Rule by rule those of MDLM's `dataloader.py` (kuleshov-group/mdlm, c112c526), which come from Lou et al. (arXiv 2310.16834) and
Megatron-LM. What looks odd in them (a replacement that only undoes a typing mistake, spaces that stay) is odd there too: the
number depends on the text, byte by byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Detokenizer = Callable[[str], str]

# One after the other: what is replaced (a text, or a pattern), and by what.
_Steps = Sequence[tuple[str | re.Pattern[str], str]]

_WIKITEXT: _Steps = (
    ("s '", "s'"),
    # A pattern of Perl's that came along with its slashes, which no text has.
    (re.compile(r"/' [0-9]/"), "/'[0-9]/"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
    # The blanks inside brackets and quotation marks; an opening and a closing mark look alike.
    (re.compile(r"\(\s*([^)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r'"\s*([^"]*?)\s*"'), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)
_PTB: _Steps = (
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    # Numbers in a row share their blanks: one pass takes every other one.
    *((" N ", " 1 ") for _ in range(10)),
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
)
_LM1B: _Steps = (
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "),
    (re.compile(r" \?$"), "?"),
    (" ! ", "! "),
    (re.compile(r" !$"), "!"),
    (" , ", ", "),
    (" : ", ": "),
    (" ; ", "; "),
    (" / ", "/"),
    (re.compile(r'" ([^"]+) "'), r'"\1"'),
    (re.compile(r"' ([^']+) '"), r"'\1'"),
    (re.compile(r"\( ([^()]+) \)"), r"(\1)"),
    (re.compile(r"\[ ([^\[\]]+) \]"), r"[\1]"),
    ("$ ", "$"),
    ("£ ", "£"),
)


def _apply(steps: _Steps, text: str) -> str:
    for found, by in steps:
        text = text.replace(found, by) if isinstance(found, str) else found.sub(by, text)
    return text


def wikitext(text: str) -> str:
    """A line of WikiText-2 or -103 (raw)."""
    return _apply(_WIKITEXT, text)


def ptb(text: str) -> str:
    """A sentence of the Penn Treebank as Mikolov prepared it: numbers become 1, unknown words a question mark."""
    return _apply(_PTB, text)


def lm1b(text: str) -> str:
    """A sentence of the One Billion Words benchmark."""
    return _apply(_LM1B, text)


def lambada(text: str) -> str:
    """A passage of LAMBADA (OpenAI's file): straight quotation marks, and a line break in front."""
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


def scientific_papers(text: str) -> str:
    """An article of the arXiv or PubMed part of Scientific Papers: WikiText's rules, then those of LM1B."""
    return lm1b(wikitext(text))


def as_it_is(text: str) -> str:
    """A text that nothing was done to (AG News)."""
    return text
