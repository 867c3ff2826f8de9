"""llada/data/work/read_config.py"""

import pytest

from llada.data.filters.chain import FilterSettings
from llada.data.filters.classifier import ClassifierFilter
from llada.data.filters.length import LengthLimits
from llada.data.filters.quality import C4Quality
from llada.data.read.parts import ReadOptions
from llada.data.work.read_config import ReadConfig
from llada.errors import UserError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"section_chars": 50}, "section_chars must be at least 100, not 50"),
        ({"max_record_bytes": 0}, "max_record_bytes must be at least 1, not 0"),
        ({"min_chars": 9, "max_chars": 5}, "max_chars must be at least min_chars=9, not 5"),
        ({"chat_fields": {"mesages": "x"}}, "chat_fields cannot name 'mesages'; did you mean 'messages'"),
        (
            {"chat_roles": {"bot": "asistant"}},
            "chat_roles cannot make a role 'asistant'; did you mean 'assistant'",
        ),
        ({"encoding": "utf16x"}, "read: encoding: there is none called 'utf16x'; did you mean 'utf-16'?"),
        ({"encoding": "rot13"}, "there is none called 'rot13'"),
        ({"encoding": "a\0b"}, "there is none called"),
        ({"filters": ("c5",)}, "there is no filter 'c5'; did you mean 'c4'"),
        ({"filters": ("gophre",)}, "there is no filter 'gophre'"),
        ({"filters": ("classifier",)}, r"needs rules\.classifier\.model"),
    ],
)
def test_what_makes_no_sense_is_named(settings, message):
    with pytest.raises(UserError, match=message):
        ReadConfig(**settings)


def test_the_chain_and_the_options_follow_the_settings():
    rules = FilterSettings(c4=C4Quality(min_sentences=2), classifier=ClassifierFilter(model="m"))
    config = ReadConfig(filters=("classifier", "c4"), rules=rules, min_chars=3, text_field="body")
    assert config.chain() == [LengthLimits(3, None), rules.c4, rules.classifier]
    assert config.options == ReadOptions("body", 64 << 20, "resiliparse")
    assert ReadConfig().options == ReadOptions()
    assert ReadConfig(section_chars=500).options.cuts_texts
    assert ReadConfig(encoding="latin-1").options.encoding == "latin-1"
