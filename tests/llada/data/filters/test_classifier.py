import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada.data.document import Document
from llada.data.filters.classifier import (
    ClassifierConfig,
    ClassifierFilter,
    QualityClassifier,
    area_under_curve,
    read_labels,
    train_classifier,
)
from llada.data.filters.view import TextView
from llada.errors import UserError

SMALL = ClassifierConfig(hash_bits=12, epochs=5)
GOOD = [f"The committee of year {i} described its methods and the results in detail." for i in range(12)]
BAD = [f"Click here!! Buy {i} now | login | cart | cheap cheap" for i in range(12)]
EXAMPLES = [(text, 1) for text in GOOD] + [(text, 0) for text in BAD]


def test_what_was_learned_is_kept_in_the_folder(tmp_path):
    classifier, figures = train_classifier(EXAMPLES, SMALL)
    assert figures == {"examples": 24, "positives": 12, "auc": 1.0, "accuracy": 1.0}
    texts = ["The results of the committee.", "Buy cheap now!!", "", "The results of the committee."]
    scores = classifier.score(texts)
    assert scores[0] > 0.6 > 0.4 > scores[1]
    assert scores[0] == scores[3]
    for url in (str(tmp_path / "c"), "memory://classifier/c"):
        classifier.save(url)
        loaded = QualityClassifier.load(url)
        assert np.array_equal(loaded.score(texts), scores)
        assert (loaded.config, loaded.figures) == (SMALL, figures)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["config.json", "weights.safetensors"]


def test_training_is_deterministic_and_the_seed_counts():
    one, two = (train_classifier(EXAMPLES, SMALL)[0] for _ in range(2))
    assert np.array_equal(one.weights, two.weights)
    other, _ = train_classifier(EXAMPLES, ClassifierConfig(hash_bits=12, epochs=5, seed=1))
    assert not np.array_equal(one.weights, other.weights)


def test_score_is_the_logistic_of_normalised_counts():
    """One text by hand: words a b a give 1-grams a (twice), b and 2-grams ab, ba; the vector's length is sqrt(7)."""
    # No n-grams of these share a bucket.
    classifier, _ = train_classifier(EXAMPLES, ClassifierConfig(epochs=1))
    weights = classifier.weights
    weights[:] = 0
    classifier.bias = 0.25
    assert classifier.score(["a b a"])[0] == pytest.approx(1 / (1 + math.exp(-0.25)))
    weights[:] = 1
    assert classifier.score(["a b a"])[0] == pytest.approx(1 / (1 + math.exp(-0.25 - 5 / math.sqrt(7))))
    assert classifier.score(["a"])[0] == pytest.approx(1 / (1 + math.exp(-1.25)))
    assert classifier.score(["x " * 1000])[0] == pytest.approx(
        1 / (1 + math.exp(-0.25 - 1999 / math.hypot(1000, 999)))
    )


@pytest.fixture(scope="module")
def trained():
    return train_classifier(EXAMPLES, SMALL)[0]


def test_a_text_scores_the_same_in_any_company(trained):
    texts = [text for text, _ in EXAMPLES] + ["", "word " * 40_000, "short"]
    together = trained.score(texts)
    assert np.array_equal(together, [trained.score([text])[0] for text in texts])
    assert np.array_equal(together, trained.score(map(TextView, texts)))
    assert trained.score([]).shape == (0,)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), min_size=1, max_size=30))
def test_area_under_curve_is_its_definition(pairs):
    pairs += [(0, 2), (1, 3)]
    positive = [score for label, score in pairs if label]
    negative = [score for label, score in pairs if not label]
    expected = np.mean([(p > n) + 0.5 * (p == n) for p in positive for n in negative])
    truth, scores = (np.array(column) for column in zip(*pairs, strict=True))
    assert area_under_curve(truth, scores) == pytest.approx(expected)


def test_labels(tmp_path):
    path = tmp_path / "labels.jsonl"
    rows = [{"body": "good", "keep": True}, {"body": "bad", "keep": 0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_labels([str(path)], "body", "keep")) == [("good", 1), ("bad", 0)]
    for row, message in (
        ({"text": "x", "label": "hq"}, r"labels\.jsonl:3: 'label' is 'hq'; give 1 for what to keep"),
        ({"text": "x", "label": 2}, "'label' is 2"),
        ({"text": "x"}, "'label' is None"),
        ({"text": None, "label": 1}, r"labels\.jsonl:3: field 'text' holds no text"),
    ):
        path.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n' + json.dumps(row) + "\n")
        with pytest.raises(UserError, match=message):
            list(read_labels([str(path)]))
    path.write_text('{"text": "a", "label": 1}\n{"text": \n')
    with pytest.raises(UserError, match=r"cannot read 1 rows \(invalid_json\)"):
        list(read_labels([str(path)]))


def test_bad_input_is_named(tmp_path):
    with pytest.raises(UserError, match="3 examples have label 1 and 12 label 0; 5 folds need 5 of each"):
        train_classifier(EXAMPLES[9:], SMALL)
    with pytest.raises(UserError, match="classifier: folds must be at least 2"):
        ClassifierConfig(folds=1)
    folder = tmp_path / "c"
    with pytest.raises(UserError, match=r"no quality classifier in .*c: .*train one"):
        QualityClassifier.load(str(folder))
    train_classifier(EXAMPLES, SMALL)[0].save(str(folder))
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"c is no llada-quality-classifier-1 folder or is damaged"):
        QualityClassifier.load(str(folder))


def test_the_filter_refuses_what_scores_low(tmp_path, trained):
    folder = str(tmp_path / "classifier")
    trained.save(folder)
    score = float(trained.score([BAD[0]])[0])
    view = TextView(BAD[0])
    refused = ClassifierFilter(model=folder)(Document(BAD[0]), view)
    assert refused.verdict == ("classifier.low_score", score, 0.5)
    assert ClassifierFilter(model=folder, threshold=score)(Document(BAD[0]), view).verdict is None
    assert ClassifierFilter(model=folder).files() == [f"{folder}/weights.safetensors"]
    assert ClassifierFilter(model=folder).problem() is None
    assert "rules.classifier.model" in ClassifierFilter().problem()


def test_human_labels_of_web_pages(shared_dir, record_property):
    examples = list(read_labels([str(shared_dir / "data/web/quality_labels.jsonl")]))
    assert len(examples) == 181
    figures = [train_classifier(examples, ClassifierConfig(seed=seed))[1] for seed in range(3)]
    auc, accuracy = (np.mean([f[name] for f in figures]) for name in ("auc", "accuracy"))
    record_property("auc", float(auc))
    print(f"5-fold cross-validated, mean of 3 seeds: AUC {auc:.3f}, accuracy {accuracy:.3f}")
    lengths = np.array([len(text) for text, _ in examples])
    by_length = area_under_curve(np.array([label for _, label in examples]), lengths)
    assert auc > 0.94 > 0.87 > by_length
    assert accuracy > 0.84


def test_chinese(shared_dir):
    """Poems against pages of questions: characters and their pairs are features."""
    data = shared_dir / "data"
    poems = [json.loads(line)["text"] for line in (data / "text/chinese_poems.jsonl").open(encoding="utf-8")]
    rows = [json.loads(line) for line in (data / "eval/ceval.fewshot.jsonl").open(encoding="utf-8")]
    questions = [row["question"] + row["explanation"] for row in rows]
    examples = [(text, 1) for text in poems[:150]] + [(text, 0) for text in questions[:150]]
    classifier, figures = train_classifier(examples)
    assert figures["auc"] > 0.99
    assert (classifier.score(poems[150:400]) > 0.5).mean() > 0.95
    assert (classifier.score(questions[150:]) < 0.5).mean() > 0.95
