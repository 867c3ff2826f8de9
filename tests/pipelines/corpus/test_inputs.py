"""What a preparation reads, settled before anything is written."""

import pytest

from llada.data.work.config import PrepareConfig, SourceConfig
from llada.errors import UserError
from pipelines.corpus.inputs import settle_sources


def test_inputs_are_one_source_with_absolute_places(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "list").write_text(f"{tmp_path}/a.txt\n")
    monkeypatch.chdir(tmp_path)
    (source,) = settle_sources(PrepareConfig(), ["a.txt", "@list"])
    assert source.name == ""
    assert source.input == (f"{tmp_path}/a.txt", f"@{tmp_path}/list")


def test_mistakes_are_named(tmp_path):
    mixture = PrepareConfig(sources=(SourceConfig("a", (str(tmp_path / "none.jsonl"),)),))
    with pytest.raises(UserError, match="give either --input or --mixture"):
        settle_sources(mixture, ["a.txt"])
    with pytest.raises(UserError, match=r"no input at .*none\.jsonl"):
        settle_sources(mixture, [])
    with pytest.raises(UserError, match="no --input given"):
        settle_sources(PrepareConfig(), [])
