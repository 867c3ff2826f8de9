"""state.json: what it must hold to be one."""

import json
from pathlib import Path

import pytest

from llada.training.checkpoint.state import DamagedError, read_state


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"step": 3}, "it is not that of step 4"),
        ({"step": "4"}, "step must be int"),
        ({"steps": 4}, "unknown setting steps"),
        ({"files": 7}, "it is not that of step 4"),
        ({"identity": {"objective": 7}}, "TypeError"),
    ],
)
def test_a_state_without_a_checksum_that_is_none_is_damaged(
    tmp_path: Path, changes: dict, reason: str
) -> None:
    state = {"identity": {"objective": {"kind": "masked_diffusion"}}, "step": 4, **changes}
    (tmp_path / "step-00000004").mkdir()
    (tmp_path / "step-00000004" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DamagedError, match=f"step-00000004/state.json is damaged .*{reason}"):
        read_state(str(tmp_path), 4)
