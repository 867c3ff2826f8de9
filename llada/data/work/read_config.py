"""How the documents of a source become clean text, and which are kept: the settings of reading and filtering."""

from __future__ import annotations

from dataclasses import dataclass, field

from llada.data.filters.chain import FilterSettings, chosen_filters
from llada.data.filters.filter import Filter
from llada.data.filters.length import LengthLimits
from llada.data.read.dialogues import FIELDS, ROLES
from llada.data.read.extraction import Extractor
from llada.data.read.parts import ReadOptions
from llada.data.read.stream import ENCODINGS, is_encoding
from llada.errors import hint
from llada.settings import check_limits, limited, require


@dataclass(frozen=True)
class ReadConfig:
    """How the documents of a source become clean text, and which are kept."""

    text_field: str = "text"
    """The field that holds the text in JSON, CSV and parquet (pretrain): a string, or a list of strings, a line each.
    "a.b" is field b of a."""
    chat_fields: dict[str, str] = field(default_factory=dict)
    """Names of a dialogue's fields that are not the usual ones: {"messages": "turns", "role": "speaker", "content":
    "said"}, or {"prompt": "ask", "answer": "reply"}; further "system", "context", "tools" and "weight" (sft)."""
    chat_roles: dict[str, str] = field(default_factory=dict)
    """Roles that are not called as usual: {"bot_7": "assistant"}; to system, user, assistant or tool (sft)."""
    encoding: str | None = None
    """In which files of text are written (.jsonl, .txt, ...), such as utf-16, latin-1 or gb18030; None: UTF-8."""
    extractor: Extractor = "resiliparse"
    """What finds the main text of the HTML pages in a WARC."""
    filters: tuple[str, ...] = ()
    """Filters to run (pretrain): "web" for FineWeb's, or names such as language, gopher_quality and pii; an unknown one
    is answered with the nearest, or with all."""
    rules: FilterSettings = field(default_factory=FilterSettings)
    """Their settings."""
    min_chars: int = 1
    """Shorter documents are left out, after cleaning (pretrain)."""
    max_chars: int | None = None
    """Longer documents are left out; None keeps all (pretrain)."""
    section_chars: int | None = limited(None, low=100)
    """Cut longer documents at empty lines into sections of about this size, each a document of its own. For a corpus
    of a few very long texts, from which whole documents cannot be held out (pretrain)."""
    max_record_bytes: int = limited(64 << 20, low=1)
    """Larger records are rejected before they are parsed."""

    def __post_init__(self) -> None:
        check_limits(self, "read")
        require(
            self.max_chars is None or self.max_chars >= self.min_chars,
            f"read: max_chars must be at least min_chars={self.min_chars}, not {self.max_chars}",
        )
        for name in self.chat_fields:
            require(name in FIELDS, f"read: chat_fields cannot name {name!r}; {hint(name, FIELDS)}")
        for role in self.chat_roles.values():
            require(role in ROLES, f"read: chat_roles cannot make a role {role!r}; {hint(role, ROLES)}")
        require(
            self.encoding is None or is_encoding(self.encoding),
            f"read: encoding: there is none called {self.encoding!r}; {hint(self.encoding, ENCODINGS)}",
        )
        self.chain()

    @property
    def options(self) -> ReadOptions:
        """What the readers need to know."""
        return ReadOptions(
            self.text_field,
            self.max_record_bytes,
            self.extractor,
            self.chat_fields,
            self.chat_roles,
            encoding=self.encoding,
            cuts_texts=self.section_chars is not None,
        )

    def chain(self) -> list[Filter]:
        """The filters that a document passes, in running order. Raises UserError."""
        return [LengthLimits(self.min_chars, self.max_chars), *chosen_filters(self.filters, self.rules)]
