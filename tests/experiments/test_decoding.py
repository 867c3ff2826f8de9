"""The experiment with networks that know nothing, as a user runs it, and what it counts."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from llada.model.hf import load_model

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def done(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoding")
    script.main(["--output", str(folder), "--quick"])
    return folder


def test_every_setting_has_its_numbers(script: ModuleType, done: Path):
    report = json.loads((done / "decoding.json").read_text())
    assert {row["table"] for row in report["rows"]} == set(script.TABLES)
    assert len(report["rows"]) == sum(map(len, script.TABLES.values()))
    for row in report["rows"]:
        for stage in script.STAGES:
            assert len(row["right"][stage]) == len(report["settings"]["networks"]["pretraining"]["seeds"])
            assert all(0 < forwards <= row["length"] for forwards in row["forwards"][stage])
    table = (done / "decoding.md").read_text()
    assert "| blocks of 4, growing |" in table
    assert "| dual, all of at least 0.9 |" in table
    assert (done / "decoding.png").stat().st_size > 10_000


def test_forwards_and_fed_tokens_are_those_of_an_answer(script: ModuleType, done: Path):
    decoding = script.Decoding(done, script.QUICK)
    network = load_model(decoding.experiment.network_folder("LLaDA", 0, "before"))
    settings = {setting.name: setting for settings in script.TABLES.values() for setting in settings}
    canvas = 8 + script.GEN_LENGTH  # a text's beginning, and the masks
    whole = decoding.write("before", network, settings["the surest, 12"])
    assert (whole.forwards, whole.fed) == (1, canvas)
    by_token = decoding.write("before", network, settings["the whole"])
    by_block = decoding.write("before", network, settings["blocks of 4, growing"])
    assert by_token.fed == pytest.approx(by_token.forwards * canvas)
    assert by_block.fed < by_block.forwards * canvas
    cached = decoding.write("before", network, settings["dual, a token a forward"])
    # Of a block's forwards the first feeds everything.
    assert cached.fed < by_token.fed


def test_what_is_asked_is_of_several_words_and_the_networks_are_those_of_the_other_experiment(
    script: ModuleType, done: Path
):
    decoding = script.Decoding(done, script.QUICK)
    assert all(len(question.answer.split()) > 1 for question in decoding.asked)
    assert len(decoding.asked) == 6 * 4 * script.QUICK.networks.asked / script.QUICK.every
    kept = {folder.name for folder in (done / "networks").iterdir()}
    assert kept == {f"llada-{seed}-{stage}" for seed in (0, 1) for stage in script.STAGES}


def test_the_readme_shows_the_committed_result(script: ModuleType):
    report = json.loads((HERE / "results" / "decoding.json").read_text())
    assert script.table(report) in (HERE.parents[1] / "README.md").read_text()
