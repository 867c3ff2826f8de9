import gzip
import json
import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from llada.data.dedup.minhash import MinHasher, comparison_words

LETTERS = str.maketrans("0123456789", "abcdefghij")  # words must not be numbers: those are all alike
WORDS = [str(number).translate(LETTERS) for number in range(400)]


def duplicate_probability(similarity: float) -> float:
    """That two documents of a Jaccard similarity share one of the 14 band keys of 8 hashes each."""
    return 1 - (1 - similarity**8) ** 14


def pair_of_similarity(rng: np.random.Generator, shared: int, own: int) -> tuple[str, str]:
    """Two texts of unordered words with Jaccard similarity shared / (shared + 2 own) of their words."""
    words = [str(number).translate(LETTERS) for number in rng.integers(1 << 40, size=shared + 2 * own)]
    return " ".join(words[: shared + own]), " ".join(words[:shared] + words[shared + own :])


@pytest.mark.parametrize("shared, own, similarity", [(90, 5, 0.9), (80, 10, 0.8), (50, 25, 0.5), (8, 1, 0.8)])
def test_signatures_estimate_jaccard_without_bias(shared, own, similarity):
    rng = np.random.default_rng(shared)
    pairs = [pair_of_similarity(rng, shared, own) for _ in range(400)]
    signatures, _ = MinHasher(ngram=1).signatures(text for pair in pairs for text in pair)
    equal = signatures[::2] == signatures[1::2]
    estimates = equal.mean(axis=1)
    standard_error = np.sqrt(similarity * (1 - similarity) / equal.size)
    assert abs(estimates.mean() - similarity) < 4 * standard_error
    # hashes that depended on each other would spread the estimates wider than independent ones
    independent = np.sqrt(similarity * (1 - similarity) / equal.shape[1])
    assert estimates.std() == pytest.approx(independent, rel=0.15)


@pytest.mark.parametrize("shared, own", [(60, 20), (70, 15), (80, 10)])
def test_duplicate_probability_follows_the_curve(shared, own):
    rng = np.random.default_rng(7)
    pairs = [pair_of_similarity(rng, shared, own) for _ in range(1500)]
    hasher = MinHasher(ngram=1)
    keys = hasher.band_keys(hasher.signatures(text for pair in pairs for text in pair)[0])
    found = (keys[::2] == keys[1::2]).any(axis=1).mean()
    expected = duplicate_probability(shared / (shared + 2 * own))
    assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / len(pairs))


def test_published_curve():
    assert duplicate_probability(0.8) == pytest.approx(0.924, abs=5e-4)
    assert duplicate_probability(0.5) == pytest.approx(0.0533, abs=5e-4)


@pytest.mark.parametrize(
    "text, words",
    [
        ("Hello,  WORLD!\nHow's it?", ["hello", "world", "how", "s", "it"]),
        ("Café naïve ÅNGSTRÖM", ["cafe", "naive", "angstrom"]),
        ("don’t “quote” — dash…", ["don", "t", "quote", "dash"]),
        ("snake_case e-mail@x.org", ["snake", "case", "e", "mail", "x", "org"]),
        ("我爱 Ray！你好", ["我", "爱", "ray", "你", "好"]),
        ("がギ", ["か", "キ"]),
        ("สวัสดี", ["ส", "ว", "ส", "ด"]),
        ("हिन्दी में", ["हिनदी", "म"]),
        ("Привет, мир", ["привет", "мир"]),
        ("가나 다", ["가나", "다"]),
        ("☃ !? 🙂", []),
        ("a\ud800b", ["a", "b"]),
    ],
)
def test_words(text, words):
    assert comparison_words(text) == [unicodedata.normalize("NFD", word) for word in words]


def test_numbers_are_alike_and_order_counts():
    hasher = MinHasher()
    texts = [
        "it cost 1234 dollars in may 2021 i think",
        "it cost 99 dollars in may 1999 I think!",
        "i think it cost 99 dollars in may 1999",
    ]
    signatures, _ = hasher.signatures(texts)
    assert (signatures[0] == signatures[1]).all()
    assert (signatures[0] != signatures[2]).any()


def test_a_batch_is_its_documents():
    """Documents of every length around the n-gram, the batch and the chunk of the hashing."""
    rng = np.random.default_rng(0)
    lengths = [0, 1, 4, 5, 6, 70_000, 3, 5, 300, 0, 200_000, 4, 90]
    texts = [" ".join(rng.choice(WORDS, length)) for length in lengths]
    hasher = MinHasher()
    signatures, positions = hasher.signatures(texts)
    assert signatures.dtype == np.uint32
    assert signatures.shape == (7, 112)
    assert positions.tolist() == [n for n, length in enumerate(lengths) if length >= 5]
    for signature, position in zip(signatures, positions, strict=True):
        assert (hasher.signatures([texts[position]])[0][0] == signature).all()


def test_a_signature_is_the_minimum_over_its_ngrams():
    texts = [" ".join(WORDS[start : start + 5]) for start in range(20)]
    hasher = MinHasher()
    whole = hasher.signatures([" ".join(WORDS[:24])])[0][0]
    assert (hasher.signatures(texts)[0].min(axis=0) == whole).all()


def test_no_documents():
    for texts in ([], ["", "four words are few"]):
        signatures, positions = MinHasher().signatures(texts)
        assert signatures.shape == (0, 112)
        assert positions.shape == (0,)
        assert MinHasher().band_keys(signatures).shape == (0, 14)


def test_band_keys_change_with_band_seed_and_one_hash():
    text = [" ".join(WORDS)]
    hasher = MinHasher()
    signature = hasher.signatures(text)[0]
    keys = hasher.band_keys(signature)
    assert keys.shape == (1, 14)
    changed = signature.copy()
    changed[0, 17] += 1  # the second hash of the third band
    assert (hasher.band_keys(changed) != keys)[0].tolist() == [band == 2 for band in range(14)]
    swapped = signature.reshape(14, 8)[::-1].reshape(1, 112)
    assert not np.isin(hasher.band_keys(swapped), keys).any()
    other = MinHasher(seed=2)
    assert not np.isin(other.band_keys(other.signatures(text)[0]), keys).any()


def test_equal_in_every_process():
    """Frozen: a new value makes every stored index useless."""
    program = (
        "from llada.data.dedup.minhash import MinHasher; h = MinHasher();"
        "print(h.band_keys(h.signatures(['the quick brown fox jumps over 2 lazy dogs'])[0])[0, :2].tolist())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(printed) == FROZEN


FROZEN = [7719652694410772872, 11226650503526981792]


def test_near_duplicates_of_real_text(shared_dir):
    """Chinese, too: a poem collection and the same with 1 % of its characters changed."""
    rng = np.random.default_rng(0)
    chinese = [
        json.loads(line)["text"]
        for line in (shared_dir / "data/text/chinese_poems.jsonl").open(encoding="utf-8")
    ]
    chinese = ["\n".join(chinese[n : n + 8]) for n in range(0, 800, 8)]
    with gzip.open(shared_dir / "data/text/c4_200.jsonl.gz", "rt", encoding="utf-8") as lines:
        english = [json.loads(line)["text"] for line in lines][:100]
    hasher = MinHasher()
    for texts in (chinese, english):
        edited = []
        for text in texts:
            units = list(text) if texts is chinese else text.split(" ")
            for place in rng.choice(len(units), max(1, len(units) // 100), replace=False):
                units[place] = "龘" if texts is chinese else "changed"
            edited.append(("" if texts is chinese else " ").join(units))
        before, kept = hasher.signatures(texts)
        after, also = hasher.signatures(edited)
        assert (kept == also).all()
        assert len(kept) > 90
        keys, edited_keys = hasher.band_keys(before), hasher.band_keys(after)
        assert (keys == edited_keys).any(axis=1).mean() >= 0.97
        others = np.roll(edited_keys, 1, axis=0)
        assert (keys == others).any(axis=1).mean() <= 0.02
