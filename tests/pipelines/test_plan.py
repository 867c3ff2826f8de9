"""`llada plan`: of a preset or a recipe's file."""

from __future__ import annotations

from llada.presets import get_preset
from llada.settings import to_json


def test_a_recipe_file_is_a_preset(llada, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(to_json(get_preset("llada_1b")))
    code, out, _ = llada("plan", str(file), "--gpus", "64")
    assert code == 0
    assert "1,487,243,264" in out


def test_a_recipe_file_that_cannot_be_read_is_named(llada, tmp_path):
    code, _, err = llada("plan", str(tmp_path / "none.json"))
    assert (code, err.strip()) == (
        1,
        f"llada plan: cannot read the recipe {tmp_path}/none.json: No such file or directory",
    )
    (tmp_path / "mine.json").write_text("{")
    code, _, err = llada("plan", str(tmp_path / "mine.json"))
    assert code == 1
    assert "not valid JSON" in err
