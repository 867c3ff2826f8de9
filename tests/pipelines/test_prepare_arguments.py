"""What `llada prepare` makes of its words: the kind, the tokenizer, the mixture."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llada.data.work.config import PrepareConfig
from llada.data.work.read_config import ReadConfig
from llada.errors import UserError
from llada.presets import get_preset
from pipelines.prepare import load_mixture, parse_words, settle_vocabulary


def config_of(*words: str) -> PrepareConfig:
    """The configuration that a command line asks for."""
    return parse_words([*words, "--output", "o"])[1]


def test_the_kind_chooses_the_presets_preparation():
    tiny = get_preset("tiny")
    assert config_of("tiny") == tiny.prepare
    for words in (("--kind", "sft"), ("--kind=sft",), ("--input", "a", "b", "--kind", "sft")):
        assert config_of("tiny", *words, "--tokenizer", "t") == replace(tiny.sft_prepare, tokenizer="t"), (
            words
        )
    # A word that looks like the option but is another's value decides nothing.
    assert config_of("tiny", "--split-seed", "1", "--tokenizer", "sft").kind == "pretrain"


def test_a_tokenizer_takes_the_place_of_training_one():
    config = config_of("tiny", "--tokenizer", "some/folder")
    assert (config.tokenizer, config.train_tokenizer_vocab) == ("some/folder", None)
    config = config_of("tiny", "--train-tokenizer-vocab", "700")
    assert (config.tokenizer, config.train_tokenizer_vocab) == (None, 700)


def test_training_one_takes_the_place_of_the_presets_tokenizer():
    preset = get_preset("llada_8b").prepare
    assert preset.tokenizer
    config = config_of("llada_8b", "--train-tokenizer-vocab", "32000")
    assert (config.tokenizer, config.train_tokenizer_vocab) == (None, 32000)
    assert settle_vocabulary(preset, preset) == preset


def test_a_tokenizer_and_training_one_exclude_each_other():
    with pytest.raises(UserError, match="either --tokenizer or --train-tokenizer-vocab"):
        config_of("tiny", "--tokenizer", "some/folder", "--train-tokenizer-vocab", "700")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "must hold 'key: value' lines"),
        ("web: {inputs: [x]}\n", "unknown setting .*web.inputs; did you mean 'input'"),
        ("web: {input: [x], read: {filtres: [web]}}\n", "web.read.filtres; did you mean 'filters'"),
        ("web: {input: x}\n", "web.input must be"),
    ],
)
def test_a_mixture_file_is_strict(tmp_path, text, message):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_mixture(str(tmp_path / "m.yaml"), ReadConfig())


def test_a_mixture_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the mixture .*none\.yaml"):
        load_mixture(str(tmp_path / "none.yaml"), ReadConfig())
