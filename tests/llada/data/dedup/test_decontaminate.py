import json

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada.data.dedup.decontaminate import (
    Decontamination,
    DecontaminationConfig,
    DecontaminationIndex,
    build_index,
    coverage_problem,
)
from llada.data.document import Document
from llada.data.filters.view import TextView
from llada.errors import UserError

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def index_of(path, rows, **settings):
    return build_index(DecontaminationConfig((write_rows(path, rows),), **settings))


def test_a_question_is_found_whatever_its_case_and_punctuation(tmp_path):
    index = index_of(tmp_path / "gsm.jsonl", [{"q": "short"}, {"q": QUESTION, "id": 7}])
    wild = "Homework!!  NATALIA sold — «clips» to 48 of\n\nher friends in Ａpril (and then, she sold HALF as many)"
    match = index.match(wild)
    assert match is not None
    assert (match.file, match.line) == (str(tmp_path / "gsm.jsonl"), 2)
    assert match.words == "natalia sold clips to 48 of her friends in april and then she sold half as many"
    assert match.ngrams == 17 - 13 + 1
    assert index.rows == 1  # the short one is not looked for
    for other in (
        "",
        "Natalia sold clips",
        wild.replace("48", "49"),
        wild.replace("friends", "good friends"),
    ):
        assert index.match(other) is None


def test_the_filter_refuses_and_notes_where(tmp_path):
    matches = []
    contaminated = Decontamination(index_of(tmp_path / "gsm.jsonl", [{"q": QUESTION}]), matches)
    fine, bad = Document("Natalia sold clips.", "a:1"), Document(f"Well: {QUESTION}", "a:2")
    assert contaminated(fine, TextView(fine.text)) == (fine, None, {})
    verdict = contaminated(bad, TextView(bad.text)).verdict
    (match,) = matches
    assert verdict == ("contaminated", match["words"], None)
    assert list(match.items())[:3] == [("place", "a:2"), ("file", f"{tmp_path}/gsm.jsonl"), ("line", 1)]


def test_thirteen_words_match_and_twelve_do_not(tmp_path):
    words = [f"w{i}" for i in range(40)]
    index = index_of(tmp_path / "a.jsonl", [{"q": " ".join(words)}])
    assert index.match(" ".join(["x", *words[20:33], "y"])).words == " ".join(words[20:33])
    assert index.match(" ".join(["x", *words[20:32], "y", *words[32:40]])) is None
    assert index.match(" ".join(words[13:0:-1])) is None  # order counts


def test_short_rows_are_looked_for_as_a_whole(tmp_path):
    eight, seven = "one two three four five six seven eight", "a b c d e f g"
    index = index_of(tmp_path / "a.jsonl", [{"q": eight}, {"q": seven}])
    assert index.match(f"zero {eight} nine").line == 1
    assert index.match(eight.removesuffix(" eight")) is None
    assert index.match(f"zero {seven} h") is None


def test_a_short_question_is_found_without_what_stands_beside_it(tmp_path):
    question, answer = "who wrote the first tale of the green lantern", "an author"
    row = {
        "id": "quiz-000017",
        "category": "literature",
        "question": question,
        "answers": [answer, "nobody knows"],
    }
    index = index_of(
        tmp_path / "a.jsonl", [row, {"first": "吾生也有涯", "second": "而知也无涯", "source": "庄子•养生主"}]
    )
    for text in (question, f"{question} {answer}", f"literature: {question}?", "「吾生也有涯，而知也无涯」"):
        assert index.match(f"so {text} they say") is not None, text
    assert index.match("so who wrote the first tale of the green lamp") is None
    assert index.match("吾生也有涯") is None  # five words are chance


def test_how_much_of_an_evaluation_set_can_be_found_is_counted(tmp_path):
    rows = [{"q": QUESTION, "a": "72"}, {"q": "short", "a": "no"}, {"n": 7}]
    index = index_of(tmp_path / "a.jsonl", rows)
    index.save(str(tmp_path / "index"))
    counted = {"file": str(tmp_path / "a.jsonl"), "rows": 3, "found_rows": 1, "fields": 4, "found_fields": 1}
    assert DecontaminationIndex.load(str(tmp_path / "index")).coverage == [counted]
    problem = coverage_problem(index.coverage, 8)
    assert problem == (
        f"2 of 3 evaluation rows of {tmp_path}/a.jsonl are not looked for: they are shorter than min_words=8; "
        "lower decontamination.min_words to look for them"
    )
    assert coverage_problem(index_of(tmp_path / "b.jsonl", rows[:1]).coverage, 8) is None
    nothing = coverage_problem(index_of(tmp_path / "c.jsonl", rows[1:]).coverage, 8)
    assert nothing.startswith(
        f"nothing was looked for in the data: none of the 2 evaluation rows of {tmp_path}/c.jsonl"
    )
    (tmp_path / "d.jsonl").write_text("\n")
    without = build_index(DecontaminationConfig((str(tmp_path / "d.jsonl"),)))
    assert "no evaluation row in" in coverage_problem(without.coverage, 8)


def test_which_strings_make_a_row(tmp_path):
    row = {
        "id": 3,
        "question": "What is the capital of the country north of Spain",
        "choices": ["Paris it is", "or Madrid"],
        "mc1_targets": {"the tower of Eiffel": 1, "and the Prado": 0},
    }
    index = index_of(tmp_path / "a.jsonl", [row])
    text = "north of Spain Paris it is or Madrid the tower of Eiffel and the Prado"
    assert index.match(text).words == text.lower()
    index = index_of(tmp_path / "a.jsonl", [row], fields=("choices", "question"))
    text = "Paris it is or Madrid what is the capital of the country north of Spain"
    assert index.match(text).words == text.lower()
    assert index.match("is the capital of the country north of Spain Paris it is or Madrid") is None
    with pytest.raises(ValueError, match=r"a\.jsonl:1 has no field 'answer'; it has id, question"):
        index_of(tmp_path / "a.jsonl", [row], fields=("answer",))


def test_what_is_left_out_of_the_evaluation_sets_is_told(tmp_path, caplog):
    write_rows(tmp_path / "a.jsonl", [{"question": QUESTION}])
    (tmp_path / "b.json").write_text('["no object"]')
    (tmp_path / "c.jsonl").touch()
    (tmp_path / "d.md").touch()
    build_index(DecontaminationConfig(files=(str(tmp_path),)))
    (told,) = caplog.messages
    assert told.startswith("left out of the evaluation sets: ")
    assert all(name in told for name in ("b.json", "c.jsonl", "d.md"))


def test_fields_may_be_nested(tmp_path):
    index = index_of(tmp_path / "a.jsonl", [{"task": {"question": QUESTION}}], fields=("task.question",))
    assert index.match(QUESTION)
    with pytest.raises(UserError, match=r"no field 'task\.text'; it has task"):
        index_of(tmp_path / "a.jsonl", [{"task": {"question": QUESTION}}], fields=("task.text",))


def test_parquet_and_jsonl_give_the_same(tmp_path):
    rows = [{"q": QUESTION, "choices": ["a", "b"]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    index = build_index(DecontaminationConfig((str(tmp_path / "a.parquet"),)))
    assert index.match(QUESTION) == index_of(tmp_path / "a.jsonl", rows).match(QUESTION)._replace(
        file=str(tmp_path / "a.parquet")
    )


def test_unreadable_evaluation_rows_are_no_small_matter(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": QUESTION}) + "\n{broken\n")
    with pytest.raises(ValueError, match=r"a\.jsonl: cannot read 1 rows \(invalid_json\)"):
        build_index(DecontaminationConfig((str(tmp_path / "a.jsonl"),)))
    with pytest.raises(UserError, match=r"no input at .*none\.jsonl"):
        build_index(DecontaminationConfig((str(tmp_path / "none.jsonl"),)))
    with pytest.raises(ValueError, match="min_words=14 must lie between 1 and ngram=13"):
        DecontaminationConfig(min_words=14)


small_texts = st.lists(st.lists(st.sampled_from("abc"), max_size=30), max_size=8)


@settings(max_examples=60, deadline=None)
@given(rows=small_texts, texts=small_texts, ngram=st.integers(1, 6))
def test_matches_are_those_of_the_definition(tmp_path_factory, rows, texts, ngram):
    """Few words and many repeats: every n-gram that is shared is found, no other, however documents are grouped."""
    path = tmp_path_factory.getbasetemp() / "decontaminate.jsonl"
    index = index_of(path, [{"q": " ".join(row)} for row in rows], ngram=ngram, min_words=min(2, ngram))

    def grams(words, size):
        return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}

    wanted = {gram for row in rows if len(row) >= min(2, ngram) for gram in grams(row, min(ngram, len(row)))}
    expected = [any(grams(text, size) & wanted for size in range(1, ngram + 1)) for text in texts]
    joined = [" ".join(text) for text in texts]
    found = index.match_all(joined)
    assert [match is not None for match in found] == expected
    assert found == [index.match(text) for text in joined]
    for text, match in zip(joined, found, strict=True):
        if match:
            assert f" {match.words} " in f" {text} "
            row = rows[match.line - 1]
            assert any(
                grams(match.words.split(), size) & grams(row, size) & wanted for size in range(1, ngram + 1)
            )


@pytest.mark.parametrize("place", ["local", "memory"])
def test_saved_index_is_the_same(tmp_path, place):
    url = str(tmp_path / "index.safetensors") if place == "local" else "memory://decontaminate/index"
    rows = [
        {"q": QUESTION},
        {"q": "one two three four five six seven eight"},
        {"q": "床前明月光，疑是地上霜。"},
    ]
    index = index_of(tmp_path / "a.jsonl", rows, fold_chinese=False)
    index.save(url)
    loaded = DecontaminationIndex.load(url)
    texts = [
        QUESTION,
        "nothing",
        f"so {rows[1]['q']}",
        "「床前明月光、疑是地上霜」",
        "牀前明月光，疑是地上霜",
    ]
    assert loaded.match_all(texts) == index.match_all(texts)
    assert [m.line if m else None for m in loaded.match_all(texts)] == [1, None, 2, 3, None]
    data = fsspec.open(url).open().read()
    loaded.save(url)
    assert fsspec.open(url).open().read() == data


def test_empty_index(tmp_path):
    index = index_of(tmp_path / "a.jsonl", [{"n": 1}])
    assert index.match(QUESTION) is None
    index.save(str(tmp_path / "index"))
    assert DecontaminationIndex.load(str(tmp_path / "index")).match_all([QUESTION, ""]) == [None, None]


def test_damaged_index_is_named(tmp_path):
    path = tmp_path / "index"
    with pytest.raises(ValueError, match="no decontamination index at .*index; build it again"):
        DecontaminationIndex.load(str(path))
    index_of(tmp_path / "a.jsonl", [{"q": QUESTION}]).save(str(path))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="index is no llada-decontamination-2 file or is damaged"):
        DecontaminationIndex.load(str(path))


def test_chinese_poems_of_the_reversal_task_are_found(shared_dir):
    pytest.importorskip("opencc", reason="traditional characters need opencc")
    data = shared_dir / "data"
    poems = [json.loads(line)["text"] for line in (data / "text/chinese_poems.jsonl").open(encoding="utf-8")]
    poem_file = str(data / "eval/poem.jsonl")
    found = build_index(DecontaminationConfig((poem_file,), fields=("first", "second"))).match_all(poems)
    matches = [match for match in found if match]
    assert len(matches) == 20
    assert len({match.line for match in matches}) == 17
    as_printed = DecontaminationConfig((poem_file,), fields=("first", "second"), fold_chinese=False)
    assert sum(match is not None for match in build_index(as_printed).match_all(poems)) == 2
    # The pairs alone, where the rows hold their source as well.
    with open(poem_file, encoding="utf-8") as lines:
        pairs = [f"{row['first']}，{row['second']}" for row in map(json.loads, lines)]
    found = build_index(DecontaminationConfig((poem_file,))).match_all(pairs)
    assert sum(match is not None for match in found) == 48


def test_real_text_against_real_benchmarks(shared_dir):
    """Lists of primes and counted numbers in code, nothing else: what comparing sets of word tuples finds."""
    data = shared_dir / "data"
    files = [str(f) for f in sorted((data / "eval").glob("*.jsonl")) if "fewshot" not in f.name]
    index = build_index(DecontaminationConfig(tuple(files)))
    code = pq.read_table(data / "text/code/thealgorithms.parquet")["text"].to_pylist()
    found = np.flatnonzero([match is not None for match in index.match_all(code)])
    assert found.tolist() == [84, 100, 124, 129, 132, 219, 492, 660, 676, 729, 735, 907, 908, 987, 1028]
    assert index.match(code[660]).words.startswith("5 7 11 13 17 19 23 29 31 37 41 43 47")
    prose = [json.loads(line)["text"] for line in (data / "text/wiki_demo.jsonl").open(encoding="utf-8")]
    prose += [json.loads(line)["text"] for line in (data / "web/quality_labels.jsonl").open(encoding="utf-8")]
    assert not any(index.match_all(prose))


def test_training_questions_that_are_few_shot_examples_are_found(shared_dir):
    data = shared_dir / "data"
    index = build_index(DecontaminationConfig((str(data / "eval/gsm8k.fewshot.jsonl"),)))
    with fsspec.open(
        str(data / "sft/gsm8k_train.jsonl.gz"), "rt", compression="gzip", encoding="utf-8"
    ) as lines:
        rows = [json.loads(line) for line in lines]
    found = index.match_all(f"{row['question']}\n{row['answer']}" for row in rows)
    assert all(match and match.line == number for number, match in enumerate(found[:500], 1))
    assert sum(match is not None for match in found[500:]) < 20  # the same story with another question
