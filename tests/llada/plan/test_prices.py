"""Price lists: every amount names its list, and a wrong list is refused in one line."""

from __future__ import annotations

import pytest

from llada.errors import UserError
from llada.plan.prices import DEFAULT, Dollars, load_prices


def test_a_list_is_read_from_yaml_and_json(tmp_path) -> None:
    written = {
        "ours.yaml": "name: ours\ndate: 2026-11-01\ngpu_hour: {b200: [3, 4.5]}\nmachines: {node_hour: 2.5}\n",
        "ours.json": '{"name": "ours", "date": "2026-11-01", "gpu_hour": {"b200": [3, 4.5]}, "machines": {"node_hour": 2.5}}',
    }
    for name, text in written.items():
        (tmp_path / name).write_text(text)
        prices = load_prices(str(tmp_path / name))
        assert prices.gpu_hours((1000, 2000), "b200") == Dollars(3000, 9000, "ours, 2026-11-01")
        assert prices.machines.node_hour == 2.5
        assert prices.gpu_hours((1, 1), "h100") is None


def test_an_amount_says_which_list_it_is_from() -> None:
    assert str(DEFAULT.dollars(1.5, 12_345)) == f"$1.50 to 12,345 (default, {DEFAULT.date})"
    assert str(DEFAULT.dollars(7)) == f"$7.00 (default, {DEFAULT.date})"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("date: 2026-11-01", "missing setting .*prices.yaml: name"),
        ("name: x\ndate: yesterday", "date must be like 2026-05-31, not 'yesterday'"),
        ("name: x\ndate: 2026-11-01\ngpu_hour: {h10: [1, 2]}", "no accelerator 'h10'"),
        (
            "name: x\ndate: 2026-11-01\ngpu_hour: {h100: [3, 2]}",
            r"gpu_hour.h100 must be \[lowest, highest\]",
        ),
        ("name: x\ndate: 2026-11-01\ngpu_hour: {h100: 3}", "gpu_hour.h100 must be .*not 3"),
        (
            "name: x\ndate: 2026-11-01\nmachines: {node_hour: -1}",
            "machines.node_hour must be at least 0",
        ),
        ("name: x\ndate: 2026-11-01\nmachines: {node: 1}", "unknown setting .*machines.node; did you mean"),
    ],
)
def test_a_wrong_list_is_refused(tmp_path, text: str, problem: str) -> None:
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(UserError, match=problem):
        load_prices(str(tmp_path / "prices.yaml"))
