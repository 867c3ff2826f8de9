import pytest

from llada.data.document import UNKNOWN
from llada.data.filters.quality import (
    C4Quality,
    FineWebQuality,
    GopherQuality,
    count_sentences,
)
from llada.data.filters.view import TextView

SENTENCE = "People have asked the council to mend that road with care. "


def gopher(text, language="en", **settings):
    verdict = GopherQuality(**settings).verdict(TextView(text), language)
    return verdict and verdict.rule.removeprefix("gopher_quality.")


def fineweb(text, language="en", **settings):
    verdict = FineWebQuality(**settings).verdict(TextView(text))
    return verdict and verdict.rule.removeprefix("fineweb_quality.")


def c4(text, **settings):
    rewritten, verdict = C4Quality(**settings).rewrite(TextView(text))
    return verdict.rule.removeprefix("c4_quality.") if verdict else rewritten


# --- Gopher -----------------------------------------------------------------------------------------------------------


def test_good_prose_is_kept():
    assert gopher(SENTENCE * 10) is None


def test_number_of_words():
    words = "that have " * 25
    assert gopher(words) is None
    assert gopher(words[5:] + "! ; ...") == "few_words", "marks are no words"
    assert gopher(words, max_words=50) is None
    assert gopher(words + "more", max_words=50) == "many_words"
    assert gopher("", min_words=None) is None


@pytest.mark.parametrize(
    ("letters", "found"), [(2, "short_words"), (3, None), (10, None), (11, "long_words")]
)
def test_mean_length_of_words(letters, found):
    assert gopher(" ".join(["q" * letters] * 60), min_stop_words=None) == found
    assert gopher(" ".join(["q" * letters] * 60), language="fi") is None


@pytest.mark.parametrize(
    ("letters", "found"), [(1, "short_words"), (2, None), (20, None), (21, "long_words")]
)
def test_mean_length_of_words_in_other_languages(letters, found):
    assert gopher(" ".join(["q" * letters] * 60), language="fi") == found
    assert gopher(" ".join(["ы" * letters] * 60), language=UNKNOWN) == found


def test_number_signs_and_ellipses():
    words = "that have " * 45  # with ten marks 100
    assert gopher(words + "# " * 10) is None
    assert gopher(words + "# " * 11) == "hashes"
    assert gopher(words + "... " * 5 + "… " * 5, max_ellipsis_lines=None) is None
    assert gopher(words + "... " * 6 + "… " * 5, max_ellipsis_lines=None) == "ellipses"


@pytest.mark.parametrize("bullet", ["- ", "  • "])
def test_lines_with_bullets(bullet):
    line = "that have been said by many"
    assert gopher("\n".join([bullet + line] * 9 + [line])) is None
    assert gopher("\n".join([bullet + line] * 10 + [line])) == "bullet_lines"


@pytest.mark.parametrize("ellipsis", ["...", "… "])
def test_lines_ending_in_an_ellipsis(ellipsis):
    line = "that have been said by many"
    assert gopher("\n".join([line + ellipsis] * 3 + [line] * 7), max_symbol_ratio=None) is None
    assert gopher("\n".join([line + ellipsis] * 4 + [line] * 7), max_symbol_ratio=None) == "ellipsis_lines"


def test_words_with_letters():
    assert gopher("that have " * 40 + "1234 " * 20) is None
    assert gopher("that have " * 40 + "1234 " * 21) == "words_without_letters"
    assert gopher("que haya " * 30 + "1234 " * 40, language="es") is None
    assert gopher("que haya " * 30 + "1234 " * 41, language="es") == "words_without_letters"


def test_stop_words():
    text = "people asked council mend road " * 12
    assert gopher(text + "the road") == "stop_words"
    assert gopher(text + "the (of)") is None, "beside punctuation too"
    assert gopher(text + "The Of") == "stop_words", "lower case"
    assert gopher(text, language="de") is None
    assert gopher(text, language=UNKNOWN) == "stop_words", "Latin letters may be English"
    assert gopher(text, min_stop_words=None) is None


# --- C4 ---------------------------------------------------------------------------------------------------------------


def test_c4_leaves_out_bad_lines():
    good = "\n".join([SENTENCE.strip()] * 5)
    assert c4(good) is good, "an unchanged text is the same object"
    assert c4(good + "\nTwo words\n  " + "x" * 1001 + " and more") == good
    assert c4(good + "\n\n three of them \n") == good + "\nthree of them"
    assert c4(good + "\n" + "x" * 1000 + " and more").endswith(" and more")
    assert c4(good + "\nPlease enable JavaScript now.") == good
    assert c4(good + "\nThis site uses Cookies to work.") == good
    assert c4(good + "\nRead our Privacy Policy here.") == good
    assert c4("Said[1] before[citation needed] me.[edit][23]\n" + good) == "Said before me.\n" + good
    assert c4("Said[1] before me.\n" + good, remove_citations=False).startswith("Said[1]")
    assert c4("java[1]script is out here.\n" + good) == good


def test_c4_terminal_punctuation_is_a_choice():
    good = "\n".join([SENTENCE.strip()] * 5)
    text = good + "\nno mark at the end\nit goes on and on...\nhe said 'so it is'"
    assert c4(text) == text
    assert c4(text, require_terminal_punctuation=True) == good + "\nhe said 'so it is'"


def test_c4_refuses_documents():
    good = "\n".join([SENTENCE.strip()] * 5)
    assert c4(good + "\nLorem Ipsum dolor sit amet.") == "lorem_ipsum"
    assert c4(good + "\nint main() { return 0 }") == "curly_bracket"
    assert c4(good + "\n{\n}") == good, "in a line that is left out anyway a bracket does not count"
    assert c4(good + "\nint main() { return 0 }", refuse_curly_brackets=False).endswith("}")


def test_c4_sentences():
    assert c4("One is here. Two is here! Is three here? Four is here.") == "few_sentences"
    assert not c4("One is here. Two is here! Is three here? Four is here. Five").endswith("_sentences")
    assert c4("one is here\n" * 4) == "few_sentences"
    assert c4("one is here\n" * 5) == ("one is here\n" * 5).strip()


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("", 1),
        ("no end", 1),
        ("One. Two.", 2),
        ('He said "go." Then left.', 2),
        ("What?! No...", 2),
        ("道可道。非常道。", 2),
    ],
)
def test_count_sentences(line, count):
    assert count_sentences(line) == count


def test_c4_counts_characters_where_they_are_words():
    text = "道可道，非常道。\n名可名。\n好。\n無名，天地之始。有名，萬物之母。\n此兩者同。"
    assert c4(text) == text.replace("\n好。", "")
    assert c4("道可道，非常道。" * 200).startswith("道"), "a long line without spaces is no long word"


# --- FineWeb ----------------------------------------------------------------------------------------------------------

LONG = [f"line number {i} is long enough to be no short one" for i in range(100)]


def test_lines_that_end_a_sentence():
    assert fineweb("\n".join([line + "." for line in LONG[:12]] + LONG[12:])) is None
    assert fineweb("\n".join([line + "." for line in LONG[:11]] + LONG[11:])) == "line_punctuation"
    assert fineweb("\n".join(line + '."' for line in LONG)) == "line_punctuation"
    assert fineweb("\n\n".join(line + "。" for line in LONG)) is None
    assert fineweb("คนทุกคนเกิดมามีอิสระและเสมอภาคกัน\nต่างคนต่างมีเหตุผล", language="th") is None
    assert fineweb(" \n\n") == "empty"


def test_short_lines():
    short = [f"{i:03d} is a line of 30 characters"[:29] + "." for i in range(68)]
    assert fineweb("\n".join(short[:67] + [line + "." for line in LONG[:33]]), max_newline_ratio=None) is None
    assert fineweb("\n".join(short + [line + "." for line in LONG[:32]])) == "short_lines"
    assert fineweb("\n".join("1" + line for line in short)) is None


def test_short_lines_without_spaces():
    assert fineweb("白日依山盡，黃河入海流。\n欲窮千里目，更上一層樓。", language="zh") is None
    assert fineweb("白日依山盡。\n欲窮千里目。", language="zh") == "short_lines"


def test_duplicate_lines():
    text = "x" * 99 + ".\n" + "y" * 1799 + ".\n"
    assert fineweb(text + "z" * 50 + ".\n" + "z" * 50 + ".", max_newline_ratio=None) == "duplicate_line_chars"
    duplicate = "it is a line of 31 characters."
    body = "\n".join(f"{i} " + "words " * 20 + "." for i in range(30))
    share = len(duplicate) / len((body + duplicate * 2).replace("\n", ""))
    text = f"{duplicate}\n{body}\n{duplicate}"
    assert fineweb(text, max_duplicate_line_chars=share) is None
    assert fineweb(text, max_duplicate_line_chars=share - 1e-6) == "duplicate_line_chars"


def test_line_breaks_per_word():
    line = "w" * 40 + " " + "v" * 40
    text = "\n".join(f"{line}{i} ." for i in range(31))  # 93 words and marks, 30 line breaks
    assert fineweb(text) == "newlines"
    assert fineweb(text + " more and more and more and more") is None  # 30 / 100
    assert fineweb(text, max_newline_ratio=30 / 93) is None


def test_published_limits():
    assert GopherQuality() == GopherQuality(
        50, 100_000, 3, 10, 2, 20, 0.1, 0.9, 0.3, 0.8, 0.6, 2,
        ("the", "be", "to", "of", "and", "that", "have", "with"),
    )  # fmt: skip
    assert C4Quality() == C4Quality(1000, True, False, 3, True, True, True, True, 5)
    assert FineWebQuality() == FineWebQuality(0.12, 30, 10, 0.67, 0.01, 0.3)
