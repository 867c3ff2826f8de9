from llada.data.read.python_docs import (
    clean_docstring,
    clean_topic,
    python_documents,
    python_questions,
    reflow,
)


def test_clean_topic():
    text = 'The "assert" statement\n**********************\n\nAn *assert* is **good**: 2 * 3 * 4.\n\n-[ Footnotes ]-\n'
    assert clean_topic(text) == 'The "assert" statement\n\nAn assert is good: 2 * 3 * 4.\n\nFootnotes'


def test_clean_docstring():
    assert clean_docstring("Add :func:`~x.y` to it.\n\n    >>> f(1)\n    2\n\n    Done with that.") == (
        "Add x.y to it.\n\nDone with that."
    )
    assert clean_docstring(">>> f(1)\n2") == ""


def test_reflow():
    assert reflow("One line\n  and more.\n\n\n  * two\n") == "One line and more.\n* two"


def test_documents():
    found = list(python_documents())
    ids = [document.place for document in found]
    assert len(set(ids)) == len(ids) > 300
    assert ids == [document.place for document in python_documents()]
    assert {"python:topic/assert", "python:module/json", "python:module/os.path"} <= set(ids)
    assert sum(len(document.text) for document in found) > 1_000_000
    assert not any(document.text.isspace() or not document.text for document in found)
    assert not any("idlelib" in i or ".test." in i for i in ids)


def test_questions():
    pairs = list(python_questions())
    assert len({p["prompt"] for p in pairs}) == len({p["response"] for p in pairs}) == len(pairs) > 1500
    assert all(40 <= len(p["response"]) <= 400 and "\n" not in p["response"] for p in pairs)
    answers = {p["prompt"]: p["response"] for p in pairs}
    assert answers["What does os.path.join do?"].startswith("Join two or more pathname components")
    assert any(prompt.startswith("What is the module ") for prompt in answers)
