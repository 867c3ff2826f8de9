"""llada/data/filters/chain.py: which filters run, in which order, on what, and what the report learns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

import llada.data.filters.chain as chain_module
from llada.data.document import Document
from llada.data.filters.chain import (
    FILTERS,
    FilterChain,
    FilterSettings,
    chosen_filters,
    filter_documents,
    plugin_settings,
    resolve_filters,
)
from llada.data.filters.filter import Filter, Filtered, Verdict
from llada.data.filters.length import LengthLimits
from llada.data.filters.pii import PiiFilter
from llada.data.filters.quality import C4Quality
from llada.data.outcomes import SAMPLE_CHARS, Report
from llada.errors import UserError

NAMES = ["url", "language", "gopher_repetition", "gopher_quality", "c4", "fineweb", "classifier", "pii"]
LINE = "People have asked the council to mend that road with care.\n"


@dataclass(frozen=True)
class Toy(Filter):
    """Refuses a word, and writes another."""

    word: str = "toy"
    label = "Toys"
    reasons = {"toy.word": "it holds `word`"}  # noqa: RUF012

    def __call__(self, document, view):
        if self.word in view.pieces:
            return Filtered(document, Verdict("toy.word", self.word))
        return Filtered(replace(document, text=view.text + "!"), None, {"toys": 1})


@pytest.fixture
def toy() -> Iterator[type[Toy]]:
    FILTERS.register("toy")(Toy)
    yield Toy
    del FILTERS._entries["toy"]


def test_names_are_resolved_in_running_order():
    assert list(FILTERS) == NAMES
    assert resolve_filters(()) == []
    assert resolve_filters(("web",)) == [name for name in NAMES if name != "classifier"]
    assert resolve_filters(("pii", "classifier", "web")) == NAMES
    assert resolve_filters(("c4", "url", "c4")) == ["url", "c4"]
    with pytest.raises(UserError, match="there is no filter 'gopher_qualty'; did you mean 'gopher_quality'"):
        resolve_filters(("gopher_qualty",))
    with pytest.raises(UserError, match="there is no filter 'wep'; did you mean 'web'"):
        resolve_filters(("wep",))


def test_the_settings_of_all_filters_keep_their_form():
    """Names of output files hold a hash of it: another form would prepare every corpus again."""
    assert json.loads(json.dumps(asdict(FilterSettings()))) == {
        "url": {"domains": [], "pages": [], "banned_words": [], "soft_words": [], "banned_subwords": [], "soft_word_threshold": 2},
        "language": {"allowed": None, "threshold": 0.65, "thresholds": [], "model": None},
        "gopher_repetition": {
            "max_duplicate_paragraphs": 0.3, "max_duplicate_paragraph_chars": 0.2, "max_duplicate_lines": 0.3,
            "max_duplicate_line_chars": 0.2, "max_top_ngram_chars": [[2, 0.2], [3, 0.18], [4, 0.16]],
            "max_duplicate_ngram_chars": [[5, 0.15], [6, 0.14], [7, 0.13], [8, 0.12], [9, 0.11], [10, 0.1]],
            "unsegmented_ngram_scale": 2,
        },
        "gopher_quality": {
            "min_words": 50, "max_words": 100000, "min_mean_word_chars": 3, "max_mean_word_chars": 10,
            "min_mean_word_chars_other": 2, "max_mean_word_chars_other": 20, "max_symbol_ratio": 0.1,
            "max_bullet_lines": 0.9, "max_ellipsis_lines": 0.3, "min_words_with_letter": 0.8,
            "min_words_with_letter_other": 0.6, "min_stop_words": 2,
            "stop_words": ["the", "be", "to", "of", "and", "that", "have", "with"],
        },
        "c4": {
            "max_word_chars": 1000, "remove_citations": True, "require_terminal_punctuation": False, "min_line_words": 3,
            "refuse_lorem_ipsum": True, "drop_javascript_lines": True, "refuse_curly_brackets": True,
            "drop_notice_lines": True, "min_sentences": 5,
        },
        "fineweb": {
            "min_punctuated_lines": 0.12, "short_line_chars": 30, "short_line_chars_unsegmented": 10, "max_short_lines": 0.67,
            "max_duplicate_line_chars": 0.01, "max_newline_ratio": 0.3,
        },
        "classifier": {"model": None, "threshold": 0.5},
        "pii": {
            "emails": True, "ips": True, "phones": True,
            "email_replacements": ["email@example.com", "firstname.lastname@example.org"],
            "ipv4_replacements": ["192.0.2.17", "192.0.2.154", "198.51.100.42", "203.0.113.8"],
            "ipv6_replacements": ["2001:db8::17", "2001:db8:5:2a::1"],
            "phone_replacements": ["555-0100", "555-0123", "555-0142", "555-0199"],
        },
    }  # fmt: skip


def test_every_rule_is_documented_by_its_filter():
    folder = Path(chain_module.__file__).parent
    given = {
        re.sub(r"\{(\w+)[^}]*\}", lambda match: {"n": "N", "unit": "UNIT", "name": "NAME"}[match[1]], rule)
        for file in folder.glob("*.py")
        if file.name != "filter.py"
        for rule in re.findall(r'Verdict\(\s*f?"([^"]+)"', file.read_text())
    }
    documented = {rule for kind in (LengthLimits, *FILTERS.values()) for rule in kind.reasons}
    patterns = [re.sub("UNIT|NAME", "[a-z]+", re.escape(rule)) + "$" for rule in given]
    assert [rule for rule in documented if not any(re.match(p, rule) for p in patterns)] == []
    assert [p for p in patterns if not any(re.match(p, rule) for rule in documented)] == []
    assert all(kind.label for kind in FILTERS.values())
    heads = [{rule.split(".")[0] for rule in kind.reasons} for kind in FILTERS.values()]
    assert sum(map(len, heads)) == len(set().union(*heads)) == len(NAMES) - 1  # pii refuses nothing


def test_a_filter_that_lacks_a_setting_is_refused_where_it_is_chosen():
    with pytest.raises(UserError, match=r"the filter classifier needs rules\.classifier\.model"):
        chosen_filters(("classifier",), FilterSettings())
    assert chosen_filters(("web",), FilterSettings())


def test_filters_see_what_the_one_before_made_of_the_text():
    """C4 leaves the menu's lines out, and only then the e-mail address is replaced."""
    menu = "home\n" + LINE * 5 + "about\nWrite to somebody@company.com about this road.\n"
    chain = FilterChain([C4Quality(), PiiFilter()])
    document = Document(menu, "a:1", url="http://a.org/")
    filtered = chain(document)
    assert filtered.verdict is None
    assert filtered.edits == {"email": 1}
    assert filtered.document == replace(document, text=filtered.document.text)
    assert filtered.document.text.startswith(LINE * 5 + "Write to ")
    assert "company.com" not in filtered.document.text


def test_the_first_refusal_counts_and_knows_the_language():
    names = ("language", "gopher_quality", "c4")
    chain = FilterChain(chosen_filters(names, FilterSettings()))
    filtered = chain(Document("Das ist ein kurzer deutscher Satz über das Wetter in Berlin."))
    assert filtered.document.language == "de"
    assert filtered.verdict.rule == "gopher_quality.few_words"
    assert not filtered.edits


def test_the_report_learns_of_the_text_as_it_was_read():
    """Also when a filter had rewritten it by then; a sample shows nothing that a filter takes out."""
    report = Report()
    filters = [LengthLimits(min_chars=10), C4Quality(min_sentences=None), PiiFilter(), Toy("road")]
    documents = [
        Document("short", "a:1"),
        Document("menu\nWrite to somebody@company.com about the road", "a:2", language="en"),
        Document("Write to somebody@company.com about the street", "a:3"),
    ]
    (kept,) = filter_documents(documents, FilterChain(filters), report)
    assert kept.place == "a:3"
    assert report.edits == {"email": 1, "toys": 1}  # of kept documents alone
    assert report.refused() == {"too_short": 1, "toy.word": 1}
    assert report.outcomes["en"]["toy.word"] == [1, len(documents[1].text)]
    (sample,) = report.samples["toy.word"]
    assert sample["text"].startswith("menu\nWrite to ")
    assert "company.com" not in sample["text"]
    assert (sample["value"], sample["limit"], sample["place"]) == ("road", None, "a:2")
    (sample,) = report.samples["too_short"]
    assert (sample["value"], sample["limit"]) == (5, None)


def test_samples_are_cut():
    report = Report()
    list(filter_documents([Document("x" * 1000)], FilterChain([LengthLimits(max_chars=10)]), report))
    assert report.samples["too_long"][0]["text"] == "x" * SAMPLE_CHARS


def test_a_filter_from_outside_runs_after_the_others_or_where_it_says(toy, monkeypatch):
    assert resolve_filters(("toy", "pii", "url")) == ["url", "pii", "toy"]
    assert "toy" not in resolve_filters(("web",))
    monkeypatch.setattr(toy, "before", "language", raising=False)
    assert resolve_filters(("toy", "pii", "url")) == ["url", "toy", "pii"]
    (ready,) = chosen_filters(("toy",), FilterSettings())
    assert ready == Toy()


def test_what_a_hash_must_cover_of_filters_from_outside(toy):
    assert plugin_settings(("web", "classifier")) == {}
    assert plugin_settings(("toy", "c4")) == {"toy": {"word": "toy"}}
