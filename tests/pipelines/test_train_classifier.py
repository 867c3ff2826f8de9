"""`llada train-classifier`, and what it makes as a filter of `llada prepare`."""

from __future__ import annotations

import json

import pytest


@pytest.mark.integration
def test_a_classifier_is_trained_and_used(llada, tmp_path, local_ray):
    """Labels to a folder, and the folder as a filter: junk goes, the rest stays."""
    good = [
        f"The report explains in plain words how test number {i} was made and what came of it."
        for i in range(40)
    ]
    junk = [f"BUY NOW {i}!!! click here >>> cheap pills cheap pills $$$ {i}" for i in range(40)]
    labels = [{"text": t, "label": int(t in good)} for t in good + junk]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    folder = str(tmp_path / "classifier")
    code, out, err = llada("train-classifier", "--input", str(tmp_path / "labels.jsonl"), "--output", folder)
    assert (code, err) == (0, "")
    assert "auc 1.000" in out
    texts = [{"text": t.replace("test", "trial")} for t in good] + [
        {"text": t.replace("here", "there")} for t in junk
    ]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    arguments = [
        "prepare",
        "tiny",
        "--input",
        str(tmp_path / "text.jsonl"),
        "--output",
        str(tmp_path / "out"),
    ]
    arguments += [
        "--read.filters",
        "classifier",
        "--read.rules.classifier.model",
        folder,
        "--read.min-chars",
        "1",
    ]
    code, _, err = llada(*arguments, "--no-progress")
    assert code == 0, err
    counts = json.loads((tmp_path / "out/manifest.json").read_text())["counts"]
    assert counts["documents_kept"] == len(good)
    assert counts["filtered"] == {"classifier.low_score": len(junk)}


def test_labels_that_cannot_be_used_are_named(llada, tmp_path):
    (tmp_path / "labels.jsonl").write_text(
        '{"text": "a sound row", "label": 1}\n{"text": "another", "label": "good"}\n'
    )
    words = ["--input", str(tmp_path / "labels.jsonl"), "--output", str(tmp_path / "classifier")]
    code, _, err = llada("train-classifier", *words)
    assert code == 1
    assert "labels.jsonl:2: 'label' is 'good'; give 1" in err
    assert not (tmp_path / "classifier").exists()
