"""Decisions of the four filters on real documents: frozen, and sound in languages other than English.

`python tests/llada/data/filters/test_filter_decisions.py SHARED` freezes today's decisions, after a change that means
to change them.
"""

import gzip
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import pytest

from llada.data.document import UNKNOWN, Document
from llada.data.filters.chain import FilterChain, FilterSettings, chosen_filters
from llada.data.filters.view import TextView
from llada.data.read.cleaning import clean_text

GOLDEN = Path(__file__).with_name("golden_filter_decisions.json")


FILTERS = chosen_filters(("gopher_repetition", "gopher_quality", "c4", "fineweb"), FilterSettings())
CHAIN = FilterChain(FILTERS)


def decide(text: str, language: str) -> list[str | None]:
    """The rule by which each filter alone refuses a text, or None."""
    document, view = Document(text, language=language), TextView(text)
    verdicts = [decide(document, view).verdict for decide in FILTERS]
    return [verdict and verdict.rule for verdict in verdicts]


def survives(text: str, language: str) -> bool:
    """Whether all four keep a text, one after the other."""
    return CHAIN(Document(text, language=language)).verdict is None


def records(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        yield from map(json.loads, file)


def english(shared: Path) -> list[str]:
    names = ["text/c4_200.jsonl.gz", "web/quality_labels.jsonl"]
    names += [f"web/cc_head/cc_en_head-{number}.jsonl.gz" for number in ("0091", "0174")]
    return [clean_text(record["text"]) for name in names for record in records(shared / "data" / name)]


def poems(shared: Path) -> list[str]:
    """Poems by one author, up to eight a document."""
    by_author = defaultdict(list)
    for poem in records(shared / "data/text/chinese_poems.jsonl"):
        by_author[poem["author"]].append(poem["text"])
    groups = [texts[i : i + 8] for texts in by_author.values() for i in range(0, len(texts), 8)]
    return [clean_text("\n\n".join(texts)) for texts in groups if len(texts) >= 4]


def reviews(shared: Path) -> list[str]:
    """Korean reviews, twenty a document."""
    texts = [review["text"] for review in records(shared / "data/text/nsmc_20k.jsonl.gz")]
    return [clean_text("\n".join(texts[i : i + 20])) for i in range(0, len(texts), 20)]


def declarations(shared: Path) -> dict[str, str]:
    """The Universal Declaration of Human Rights, by language."""
    by_language = defaultdict(list)
    for passage in records(shared / "data/text/udhr_passages.jsonl.gz"):
        by_language[passage["lang"]].append(passage["text"])
    return {language: clean_text("\n".join(texts)) for language, texts in by_language.items()}


def frozen_documents(shared: Path) -> list[tuple[str, str]]:
    return [
        *((text, "en") for text in english(shared)),
        *((text, "zh") for text in poems(shared)[:100]),
        *((text, "ko") for text in reviews(shared)[:100]),
        *((text, language) for language, text in declarations(shared).items()),
    ]


def fingerprint(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()


def test_decisions_are_as_frozen(shared_dir):
    golden = json.loads(GOLDEN.read_text())
    now = {fingerprint(text): decide(text, language) for text, language in frozen_documents(shared_dir)}
    assert {key: rules for key, rules in now.items() if golden.get(key) != rules} == {}
    assert len(now) == len(golden)


def test_human_judges_agree_that_what_is_kept_is_better(shared_dir):
    labels = list(records(shared_dir / "data/web/quality_labels.jsonl"))
    kept = {
        label: [survives(clean_text(r["text"]), "en") for r in labels if r["label"] == label]
        for label in (0, 1)
    }
    shares = {label: sum(found) / len(found) for label, found in kept.items()}
    assert shares[1] > 2 * shares[0]


@pytest.mark.parametrize(
    ("documents", "language"), [(poems, "zh"), (poems, UNKNOWN), (reviews, "ko"), (reviews, UNKNOWN)]
)
def test_chinese_and_korean_survive(shared_dir, documents, language):
    texts = documents(shared_dir)[:200]
    assert sum(survives(text, language) for text in texts) / len(texts) > 0.8


def test_single_poems_pass_the_word_rules(shared_dir):
    texts = [clean_text(poem["text"]) for poem in records(shared_dir / "data/text/chinese_poems.jsonl")]
    texts = [text for text in texts if len(text) >= 80]  # the limit of 50 words stands for characters, too
    kept = sum(decide(text, "zh")[:2] == [None, None] for text in texts)
    assert kept / len(texts) > 0.95


def test_the_declaration_survives_in_nearly_every_language(shared_dir):
    texts = declarations(shared_dir)
    lost = [language for language, text in texts.items() if not survives(text, language)]
    assert len(lost) <= 0.05 * len(texts), lost
    scripts = {
        "cmn_hans",
        "cmn_hant",
        "jpn",
        "kor",
        "tha",
        "lao",
        "khm",
        "mya",
        "bod",
        "hin",
        "arb",
        "ell",
        "heb",
    }
    assert not scripts & set(lost)


def test_junk_in_other_languages_does_not(shared_dir):
    words = [
        "제품",
        "특가",
        "무료",
        "배송",
        "최저가",
        "클릭",
        "문의",
        "전화",
        "할인",
        "이벤트",
        "쇼핑",
        "추천",
        "인기",
    ]
    poem = poems(shared_dir)[0]
    lines = poem.split("\n")
    shuffled = random.Random(0).choices(words, k=400)
    junk = {
        "ko menu": ("\n".join(shuffled), "ko"),
        "ko repeats": ("무료 배송 특가 할인 이벤트입니다. " * 60, "ko"),
        "zh menu": ("\n".join(["首頁", "關於我們", "聯絡方式", "最新消息"] * 30), "zh"),
        "zh repeats": ("點擊這裡立即購買特價商品。" * 60, "zh"),
        "zh numbers": ("一 1234 5678 9012 3456 " * 40, "zh"),
        "zh lines twice": ("\n".join(lines + lines[: len(lines) // 2]), "zh"),
        "th repeats": ("คลิกที่นี่เพื่อซื้อสินค้าราคาพิเศษ " * 60, "th"),
    }
    assert [name for name, (text, language) in junk.items() if survives(text, language)] == []


if __name__ == "__main__":
    decisions = {
        fingerprint(text): decide(text, language) for text, language in frozen_documents(Path(sys.argv[1]))
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(rules)}" for key, rules in sorted(decisions.items()))
    GOLDEN.write_text(f"{{\n{lines}\n}}\n")
