"""The data sets of the published zero-shot perplexities, and any other text: what a document of theirs is, read from local files.

    wikitext2 wikitext103   a line each, its line end included      lm1b ptb   a sentence a line
    lambada                 a passage                               ag_news    a news item
    scientific_papers_arxiv scientific_papers_pubmed                an article
    plain                   whatever else: a .txt file, or what stands between two <|endoftext|> in it; a row of JSON lines

A file is JSON lines with the field that the data set's own rows have, or text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from llada.errors import UserError
from llada.evals.local_rows import (
    JSON_LINES,
    TEXT,
    field_of,
    is_json_lines,
    is_readable,
    lines_of,
    rows_of,
    stem_of,
)
from llada.evals.perplexity import detokenizers
from llada.evals.perplexity.detokenizers import Detokenizer
from llada.files import exists, file_sizes, join
from llada.registry import Registry
from llada.settings import check_limits, limited
from llada.tokenizer import END_OF_TEXT


class Published(NamedTuple):
    """Zero-shot perplexities of the small networks (110 M parameters, trained on OpenWebText) in MDLM's Table 3."""

    mdlm: float
    """A bound."""
    autoregressive: float


@dataclass(frozen=True)
class DataSet:
    """How its files are read, and how its tokens are wrapped into blocks where nothing else is asked for."""

    detokenize: Detokenizer = detokenizers.as_it_is
    field: str = "text"
    """Of JSON lines."""
    lines: Literal["kept", "stripped"] | None = "stripped"
    """In a .txt file each line is a document, with its line end or without white space around it; None: the file is one, or several with
    <|endoftext|> between them, as `llada prepare` reads it."""
    eos_between: bool = False
    """An EOS stands behind each document. MDLM trains so, but its table of zero-shot perplexities is without."""
    block_ends: bool = True
    """Each block is [BOS] … [EOS]."""
    keeps_rest: bool = False
    """What does not fill the last block is scored as a shorter one."""
    published: Published | None = None


DATA_SETS: Registry[DataSet] = Registry(
    "data set",
    {
        # The table has a column "Wikitext" (32.83 and 25.75), and does not say which.
        "wikitext2": DataSet(detokenizers.wikitext, lines="kept"),
        "wikitext103": DataSet(detokenizers.wikitext, lines="kept"),
        "ptb": DataSet(detokenizers.ptb, field="sentence", published=Published(95.26, 82.05)),
        "lm1b": DataSet(detokenizers.lm1b, published=Published(67.01, 51.25)),
        "lambada": DataSet(detokenizers.lambada, published=Published(47.52, 51.28)),
        "ag_news": DataSet(published=Published(61.15, 52.09)),
        "scientific_papers_arxiv": DataSet(
            detokenizers.scientific_papers, field="article", published=Published(37.37, 41.73)
        ),
        "scientific_papers_pubmed": DataSet(
            detokenizers.scientific_papers, field="article", published=Published(41.89, 49.01)
        ),
        "plain": DataSet(lines=None, eos_between=True, block_ends=False, keeps_rest=True),
    },
)


@dataclass(frozen=True)
class TextsConfig:
    """Texts on which the task "text_perplexity" measures the checkpoint."""

    paths: tuple[str, ...] = ()
    """Files (.txt or JSON lines, compressed or not), folders of them, or NAME=FILE with a data set of llada/evals/perplexity/corpora.py. A file
    that bears a data set's name, ptb.txt, is read, detokenised and wrapped as its published perplexities are."""
    block_length: int | None = limited(None, low=1)
    """Tokens of a block, its ends included; None: the checkpoint's context (MDLM: 1,024)."""
    eos_between: bool | None = None
    """Whether an EOS stands behind each document; None, here and below: as the data set has it."""
    block_ends: bool | None = None
    """Whether each block is [BOS] … [EOS]."""
    keeps_rest: bool | None = None
    """Whether what does not fill the last block is scored as a shorter one, or left out."""
    max_blocks: int | None = limited(None, low=1)
    """Of each text, from its start; None: all."""

    def __post_init__(self) -> None:
        check_limits(self, "texts")


class Corpus(NamedTuple):
    """A file, and what it holds."""

    name: str
    """In the figures."""
    url: str
    data_set: DataSet


def find_corpora(paths: Sequence[str]) -> list[Corpus]:
    """The files behind "FILE", "FOLDER" or "NAME=FILE", where NAME is a data set; a file that bears a data set's name is one,
    any other is "plain" and goes by its own name.

    Raises UserError: nothing there, no data set of that name (naming the nearest), two files of one name.
    """
    found: list[Corpus] = []
    for path in paths:
        name, is_named, url = path.partition("=")
        if is_named and "/" not in name:
            data_set = DATA_SETS.find(name)
            _require_file(url)
            found.append(Corpus(name, url, data_set))
            continue
        urls = [
            join(path, file) for file in sorted(file_sizes(path)) if "/" not in file and is_readable(file)
        ]
        if not urls:
            _require_file(path)
        for file in urls or [path]:
            stem = stem_of(file)
            # Names of figures and of folders, which not every character may stand in.
            name = re.sub(r"[^\w.-]", "_", stem, flags=re.ASCII)
            found.append(Corpus(name, file, DATA_SETS[stem if stem in DATA_SETS else "plain"]))
    names = [corpus.name for corpus in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two files go by the name {twice!r}; give them other names")
    return found


def _require_file(url: str) -> None:
    if not exists(url):
        raise UserError(f"there is no file {url}")
    if not is_readable(url):
        raise UserError(
            f"{url} holds no texts: names must end in {' '.join((*TEXT, *JSON_LINES))}, compressed or not"
        )


def read_documents(corpus: Corpus) -> Iterator[str]:
    """Its documents, detokenised, in their order, one at a time. Raises UserError naming the file, and the row without a text."""
    data_set = corpus.data_set
    if is_json_lines(corpus.url):
        texts: Iterable[str] = (
            field_of(row, data_set.field, str, f"{corpus.url}, row {number}")
            for number, row in enumerate(rows_of(corpus.url), start=1)
        )
    elif data_set.lines is None:
        texts = (text for text in _split_documents(lines_of(corpus.url)) if text.strip())
    else:
        kept = data_set.lines == "kept"
        # An empty line is an empty document, as in the data set's own rows.
        texts = (line if kept and line.strip() else line.strip() for line in _ended_lines(corpus.url))
    return map(data_set.detokenize, texts)


def _ended_lines(url: str) -> Iterator[str]:
    """Its lines, the last one with an end, too. Not `splitlines`, for which signs within a sentence end lines, too."""
    for line in lines_of(url):
        yield line if line.endswith("\n") else f"{line}\n"


def _split_documents(lines: Iterable[str]) -> Iterator[str]:
    """What stands between two <|endoftext|>, which no line end stands within."""
    parts: list[str] = []
    for line in lines:
        *ended, rest = line.split(END_OF_TEXT)
        for text in ended:
            yield "".join([*parts, text])
            parts = []
        parts.append(rest)
    yield "".join(parts)
