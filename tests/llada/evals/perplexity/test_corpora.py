"""The data sets of perplexities: which files they are, and what their documents are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llada.errors import UserError
from llada.evals.perplexity.corpora import DATA_SETS, TextsConfig, find_corpora, read_documents

WIKI = " = Head = \n\n   \n A ( b ) . \n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "wikitext2.txt").write_text(WIKI)
    (tmp_path / "ptb.txt").write_text(" no it was n't \n N N a <unk> \n")
    (tmp_path / "scientific_papers_arxiv.jsonl").write_text(json.dumps({"article": "a @-@ b ."}) + "\n")
    (tmp_path / "notes.txt").write_text("one\n\ntwo ( 2 )\n")
    (tmp_path / "lm1b.jsonl.txt").write_text('{"a line\x85 that": 1}\n')
    (tmp_path / "more.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "readme.md").write_text("# no text of ours")
    return tmp_path


def test_a_folder_is_read_by_the_names_of_its_files(folder: Path) -> None:
    corpora = {corpus.name: corpus for corpus in find_corpora([str(folder)])}
    assert {name: corpora[name].data_set is DATA_SETS["plain"] for name in corpora} == {
        "lm1b": False,
        "more": True,
        "notes": True,
        "ptb": False,
        "scientific_papers_arxiv": False,
        "wikitext2": False,
    }
    texts = {name: list(read_documents(corpus)) for name, corpus in corpora.items()}
    # Lines of WikiText keep their ends and are empty where they are blank; sentences of PTB lose them.
    assert texts["wikitext2"] == [" = Head =\n", "", "", " A (b).\n"]
    assert texts["ptb"] == ["no it wasn't", "N 1 a ?"]
    assert texts["scientific_papers_arxiv"] == ["a-b ."]
    assert texts["notes"] == ["one\n\ntwo ( 2 )\n"]
    assert texts["more"] == ["a", "b"]
    # A line ends where it does for the data set's readers, and a .txt file is text.
    assert texts["lm1b"] == ['{"a line\x85 that": 1}']


def test_a_file_may_be_called_a_data_set(folder: Path) -> None:
    (corpus,) = find_corpora([f"lm1b={folder}/notes.txt"])
    assert (corpus.name, list(read_documents(corpus))) == ("lm1b", ["one", "", "two (2)"])
    (plain,) = find_corpora([f"plain={folder}/ptb.txt"])
    assert list(read_documents(plain)) == [" no it was n't \n N N a <unk> \n"]
    (folder / "stories.txt").write_text("One.\n<|endoftext|>\nTwo.<|endoftext|>\n")
    assert list(read_documents(*find_corpora([f"{folder}/stories.txt"]))) == ["One.\n", "\nTwo."]


def test_a_name_is_one_for_figures(tmp_path: Path) -> None:
    (tmp_path / "my notes é(1).txt").write_text("x")
    assert [corpus.name for corpus in find_corpora([str(tmp_path)])] == ["my_notes___1_"]


def test_what_is_no_text_is_named(folder: Path) -> None:
    for paths, message in (
        ([f"ptv={folder}/ptb.txt"], "there is no data set 'ptv'; did you mean 'ptb'"),
        ([f"{folder}/none.txt"], r"there is no file .*none\.txt"),
        ([f"ptb={folder}/none.txt"], r"there is no file .*none\.txt"),
        ([f"{folder}/readme.md"], r"readme\.md holds no texts: names must end in \.txt \.jsonl"),
        ([f"{folder}/ptb.txt", f"ptb={folder}/notes.txt"], "two files go by the name 'ptb'"),
    ):
        with pytest.raises(UserError, match=message):
            find_corpora(paths)
    (corpus,) = find_corpora([f"ptb={folder}/more.jsonl"])
    with pytest.raises(UserError, match=r"more\.jsonl, row 1 has no field 'sentence'"):
        list(read_documents(corpus))
    with pytest.raises(UserError, match="block_length must be at least 1"):
        TextsConfig(block_length=0)
