"""`llada plan`: of a preset or a recipe's file, or from a budget; what it prints and what it refuses."""

from __future__ import annotations

import json

import pytest

from llada.presets import PRESETS, get_preset
from llada.settings import to_json
from pipelines.plan import CONTROLLER_POLL_S


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


def test_the_json_holds_what_the_table_says(llada, tmp_path):
    (tmp_path / "prices.yaml").write_text("{name: ours, date: 2026-11-01, gpu_hour: {b200: [4, 6]}}")
    words = ["plan", "llada_1b", "--gpus", "16", "--gpu", "b200", "--prices", str(tmp_path / "prices.yaml"),
             "--requests-per-second", "5", "--tokens", "1e11"]  # fmt: skip
    code, out, _ = llada(*words, "--json", "--png", str(tmp_path / "plan.png"))
    assert code == 0
    found = json.loads(out)
    hours = [24 * 16 * days for days in found["days"]]
    assert found["bill"] == {"low": hours[0] * 4, "high": hours[1] * 6, "prices": "ours, 2026-11-01"}
    shortest, longest = (days / found["goodput"] for days in found["training"]["days_range"])
    assert found["days"] == pytest.approx([shortest, longest])
    assert found["serving_hour"]["low"] == found["serving"]["replicas"][0] * 4
    assert found["corpus"]["tokens"] == 1e11
    assert 0 < found["best_goodput"] < 1
    assert {run["name"][:8] for run in found["published"]} >= {"LLaDA-8B", "Llama 3."}
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    code, table, _ = llada(*words)
    assert code == 0
    # Training and serving, nodes, storage: each amount says its list.
    lines = [line for line in table.splitlines() if "$" in line]
    assert len(lines) == 4
    assert all("(ours, 2026-11-01)" in line for line in lines)
    assert "4.00 passes" in table


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_can_be_planned(llada, preset):
    code, out, _ = llada("plan", preset, "--gpus", "4")
    assert code == 0
    assert "goodput" in out
    assert "first to break" in out


def test_a_budget(llada):
    code, out, _ = llada("plan", "budget", "--gpu-hours", "500")
    assert code == 0
    assert "6.23e+20" in out
    assert "$995 to 2,500 (default, 2026-05-31)" in out
    code, out, _ = llada("plan", "budget", "--dollars", "2500", "--unique-tokens", "1e9", "--json")
    found = json.loads(out)
    assert found["gpu_hours"] == pytest.approx(500)
    assert found["epochs"] == pytest.approx(found["tokens"] / 1e9)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["llada_8b", "--gpu", "h10"], "no accelerator 'h10'; did you mean 'h100'?"),
        (["llada_8b", "--gpus", "8000", "--mtbf-gpu-hours", "100"], "something fails every 45 s"),
        (["llada_8b", "--prices", "none.yaml"], "cannot read the price list none.yaml: No such file"),
        (["budget"], "give one of --flops, --gpu-hours and --dollars"),
        (["budget", "--flops", "1e20", "--dollars", "5"], "not flops and dollars"),
        (["budget", "--flops", "1e25"], "is outside 1e+19 to 1e+21"),
        (["budget", "--dollars", "1e4", "--gpu", "mi300x"], "has no price of a mi300x"),
    ],
)
def test_what_cannot_be_planned_is_one_line(llada, words, line):
    code, out, err = llada("plan", *words)
    assert (code, out) == (1, "")
    assert line in err
    assert len(err.splitlines()) == 1


def test_a_gpu_without_a_price_is_planned_all_the_same(llada):
    code, out, _ = llada("plan", "llada_8b", "--gpus", "64", "--gpu", "mi300x")
    assert code == 0
    assert "no price of a mi300x (default, 2026-05-31): give a list with --prices" in out


def test_the_controllers_poll_is_rays():
    from ray.train.v2._internal.constants import DEFAULT_HEALTH_CHECK_INTERVAL_S

    assert CONTROLLER_POLL_S == DEFAULT_HEALTH_CHECK_INTERVAL_S
