import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada.data.filters.repetition import GopherRepetition
from llada.data.filters.view import TextView
from llada.data.filters.words import split_words

NONE = {
    "max_duplicate_paragraphs": None,
    "max_duplicate_paragraph_chars": None,
    "max_duplicate_lines": None,
    "max_duplicate_line_chars": None,
    "max_top_ngram_chars": (),
    "max_duplicate_ngram_chars": (),
}


def rule(text, **limits):
    verdict = GopherRepetition(**{**NONE, **limits}).verdict(TextView(text))
    return verdict and (verdict.rule.removeprefix("gopher_repetition."), verdict.value)


def test_nothing_is_refused_as_empty():
    assert GopherRepetition().verdict(TextView(" \n ")).rule == "gopher_repetition.empty"


@pytest.mark.parametrize(("breaks", "unit"), [("\n", "line"), ("\n\n", "paragraph"), ("\n\n\n", "paragraph")])
def test_duplicate_lines_and_paragraphs(breaks, unit):
    text = breaks.join(["aaaa"] * 4 + ["b", "c", "d", "e", "f", "g"])  # 3 of 10 repeat, with 12 characters
    assert rule(text, **{f"max_duplicate_{unit}s": 0.3}) is None
    assert rule(text, **{f"max_duplicate_{unit}s": 0.29}) == (f"duplicate_{unit}s", 0.3)
    share = 12 / len(text)
    assert rule(text, **{f"max_duplicate_{unit}_chars": share}) is None
    assert rule(text, **{f"max_duplicate_{unit}_chars": share - 0.001}) == (f"duplicate_{unit}_chars", share)


def test_empty_lines_separate_and_do_not_repeat():
    assert rule("a\n\nb\n\n\nc\n\nd", max_duplicate_lines=0.0, max_duplicate_line_chars=0.0) is None


def test_the_most_frequent_ngram():
    text = "to be or not to be that is what asks to be"
    share = 3 * len("to be") / len(text)
    assert rule(text, max_top_ngram_chars=((2, share),)) is None
    assert rule(text, max_top_ngram_chars=((2, share - 0.001),)) == ("top_2_gram", share)


def test_of_equally_frequent_ngrams_the_first_counts():
    text = "a b c dddddddd eeeeeeee a b x dddddddd eeeeeeee"
    assert rule(text, max_top_ngram_chars=((2, 0.01),)) == ("top_2_gram", 2 * len("a b") / len(text))


def test_ngrams_that_repeat_are_counted_without_overlap():
    # 3-grams: xyx and yxy are new, then xyx and yxy repeat, one jumped over after the other.
    text = "x y " * 5
    assert rule(text, max_duplicate_ngram_chars=((3, 0.1),)) == ("duplicate_3_gram", 6 / len(text))


def test_characters_are_twice_as_many_where_they_are_words():
    text = "東西南北" + "天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往秋收冬藏" + "東西南北"
    share = 2 * 4 / len(text)
    assert rule(text, max_top_ngram_chars=((2, share - 0.001),)) == ("top_2_gram", share)
    assert rule("天地玄黃，宇宙洪荒。", max_top_ngram_chars=((2, 0.2), (3, 0.18))) is None, "occurs only once"


def test_published_limits():
    config = GopherRepetition()
    assert config.max_top_ngram_chars == ((2, 0.20), (3, 0.18), (4, 0.16))
    assert config.max_duplicate_ngram_chars == (
        (5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)
    )  # fmt: skip
    limits = {name: getattr(config, name) for name in list(NONE)[:4]}
    assert list(limits.values()) == [0.3, 0.2, 0.3, 0.2]


def by_definition(text, config):
    """The rules as they read, one n-gram after the other: (rule, share) of the first that fails."""

    def duplicates(parts):
        seen, chars, count = set(), 0, 0
        for part in parts:
            count, chars = (count + 1, chars + len(part)) if part in seen else (count, chars)
            seen.add(part)
        return count / len(parts), chars / len(text)

    if not text.strip():
        return "empty", 0
    for unit, parts in (("paragraph", re.split(r"\n{2,}", text.strip())), ("line", re.split(r"\n+", text))):
        count, chars = duplicates(parts)
        if count > getattr(config, f"max_duplicate_{unit}s"):
            return f"duplicate_{unit}s", count
        if chars > getattr(config, f"max_duplicate_{unit}_chars"):
            return f"duplicate_{unit}_chars", chars
    words = split_words(text)
    for n, limit in config.max_top_ngram_chars:
        if grams := Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1)):
            gram, count = grams.most_common(1)[0]
            if count * len(gram) / len(text) > limit:
                return f"top_{n}_gram", count * len(gram) / len(text)
    for n, limit in config.max_duplicate_ngram_chars:
        seen, chars, i = set(), 0, 0
        while i <= len(words) - n:
            gram = tuple(words[i : i + n])
            chars += len("".join(gram)) if gram in seen else 0
            i += n if gram in seen else 1
            seen.add(gram)
        if chars / len(text) > limit:
            return f"duplicate_{n}_gram", chars / len(text)
    return None


VOCABULARY = st.sampled_from(
    ["a", "bb", "the", "cat,", "don't", "extraordinarily", "x-y", "7", "\n", "\n\n", "\n\n\n"]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(VOCABULARY, max_size=60), st.integers(0, 300))
def test_the_short_cuts_change_no_decision(words, distinct):
    # Words that never repeat dilute the repeats: texts on both sides of every limit.
    text = " ".join([*words, *(f"word{i}" for i in range(distinct))])
    config = GopherRepetition()
    verdict = config.verdict(TextView(text))
    assert (verdict and (verdict.rule.removeprefix("gopher_repetition."), verdict.value)) == by_definition(
        text, config
    )
