"""Settings of a preparation: what makes no sense, and what of them decides the bytes of the shards."""

from dataclasses import asdict

import pytest

from llada.data.dedup.decontaminate import DecontaminationConfig
from llada.data.dedup.steps import DedupConfig
from llada.data.work.config import PrepareConfig, SourceConfig
from llada.data.work.read_config import ReadConfig
from llada.settings import flatten_settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_length": 0}, "prepare: row_length must be at least 8, not 0"),
        ({"row_length": 1 << 30}, "row_length must be at most"),
        ({"kind": "other"}, "kind must be one of pretrain, sft, unified, not 'other'"),
        ({"packing": "tight"}, "packing must be one of concatenate_and_cut, best_fit"),
        ({"read": ReadConfig(chat_roles={"bot": "assistant"})}, "chat_roles are for kind sft and unified"),
        ({"turns": "first"}, "turns must be one of all, random, not 'first'"),
        ({"kind": "unified", "dedup": DedupConfig()}, "are for kind pretrain"),
        ({"max_lost_text_fraction": 2}, "max_lost_text_fraction must be at most 1"),
        ({"too_long": "keep"}, "too_long must be one of drop, truncate_prompt"),
        ({"validation_fraction": 1.0}, "validation_fraction must be below 1, not 1.0"),
        ({"train_tokenizer_vocab": 0}, "train_tokenizer_vocab must be at least 1"),
        ({"max_invalid_fraction": 2.0}, "max_invalid_fraction must be at most 1"),
        ({"unit_bytes": 0}, "unit_bytes must be at least 1"),
        ({"kind": "sft", "dedup": DedupConfig()}, "are for kind pretrain"),
        ({"kind": "sft", "read": ReadConfig(filters=("c4",))}, "are for kind pretrain"),
        ({"kind": "sft", "decontamination": DecontaminationConfig(("x",))}, "are for kind pretrain"),
        ({"sources": (SourceConfig("a", ()), SourceConfig("a", ()))}, "two sources are called 'a'"),
        (
            {"sources": (SourceConfig("a", (), 1.0), SourceConfig("b", ()))},
            "give all sources a weight, or none",
        ),
    ],
)
def test_senseless_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0.0}, "source a: epochs must be above 0, not 0.0"),
        ({"weight": -1.0}, "source a: weight must be above 0"),
        ({"max_tokens": 0}, "source a: max_tokens must be at least 1"),
    ],
)
def test_senseless_sources(changes, message):
    with pytest.raises(ValueError, match=message):
        SourceConfig("a", (), **changes)


def test_what_changes_no_byte_of_a_shard_is_not_its_content():
    config = PrepareConfig(tokenizer="a")
    # A given tokenizer is used; what would be trained without it is idle.
    for same in (
        PrepareConfig(tokenizer="b", train_tokenizer_vocab=400),
        PrepareConfig(tokenizer="a", max_invalid_fraction=1.0, keep_documents=True),
    ):
        assert same.content() == config.content()
    assert config.content()["train_tokenizer_vocab"] is None
    assert "encoding" not in config.content()["read"]  # as in folders from before it could be set
    assert PrepareConfig(read=ReadConfig(encoding="utf-16")).content()["read"]["encoding"] == "utf-16"
    trained = [PrepareConfig(train_tokenizer_vocab=size).content() for size in (400, 401)]
    assert trained[0] != trained[1]


def test_sources_count_by_how_they_are_read():
    sources = (SourceConfig("a", ("x",), 1.0), SourceConfig("b", ("y",), 2.0))
    moved = (SourceConfig("a", ("elsewhere",), 3.0, epochs=2.0), SourceConfig("b", ("y",), 2.0))
    other = (SourceConfig("a", ("x",), 1.0, read=ReadConfig(min_chars=2)), SourceConfig("b", ("y",), 2.0))
    content = PrepareConfig(sources=sources).content()
    assert PrepareConfig(sources=moved).content() == content != PrepareConfig(sources=other).content()


def test_what_says_nothing_of_dialogues_is_in_no_hash():
    plain = PrepareConfig(sources=(SourceConfig("a", ("x",)),)).content()
    assert "chat_roles" not in {**plain["read"], **plain["sources"]["a"]}
    told = PrepareConfig(kind="sft", read=ReadConfig(chat_roles={"bot": "assistant"})).content()
    assert told["read"]["chat_roles"] == {"bot": "assistant"}
    for kind, turns in (("pretrain", "random"), ("unified", "random"), ("sft", "all")):
        assert "turns" not in PrepareConfig(kind=kind, turns=turns).content()
    assert PrepareConfig(kind="sft", turns="random").content()["turns"] == "random"
    assert PrepareConfig(max_lost_text_fraction=0.5).content() == PrepareConfig().content()


def test_the_settings_in_force_are_those_that_the_others_leave_a_meaning():
    plain = flatten_settings(PrepareConfig(train_tokenizer_vocab=300).in_force())
    assert plain["train_tokenizer_vocab"] == 300
    assert plain["read.text_field"] == "text"
    for idle in ("too_long", "dedup", "decontamination", "read.rules", "read.chat", "keep_documents"):
        assert not [name for name in plain if name.startswith(idle)], idle
    read = ReadConfig(filters=("c4",))
    web = flatten_settings(
        PrepareConfig(
            tokenizer="t",
            sources=(SourceConfig("web", ("w",), 1.0, read=read), SourceConfig("code", ("c",), 2.0)),
            dedup=DedupConfig(),
        ).in_force()
    )
    assert web["sources.code.weight"] == 2.0
    assert web["dedup.bands"] == 14
    assert {name.split(".")[5] for name in web if name.startswith("sources.web.read.rules.")} == set(
        asdict(read.rules.c4)
    )
    for idle in ("read.", "train_tokenizer_vocab", "tokenizer_sample_bytes", "sources.code.read.rules"):
        assert not [name for name in web if name.startswith(idle)], idle
    chat = PrepareConfig(kind="sft", tokenizer="t").in_force()
    assert (chat["too_long"], chat["turns"]) == ("drop", "all")
    whole = PrepareConfig(kind="unified", tokenizer="t").in_force()
    assert chat.keys() - whole.keys() == {"too_long", "turns"}
    assert whole.keys() - chat.keys() == {"packing"}
    assert whole["read"] == chat["read"]
    assert set(chat["read"]) == {"chat_fields", "chat_roles", "encoding", "extractor", "max_record_bytes"}
