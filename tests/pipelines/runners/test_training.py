"""A training stage that is refused has written nothing. (That it trains: test_pretrain.py, test_sft.py.)"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llada.errors import UserError
from llada.training.checkpoint import lease
from llada.training.checkpoint.lease import Lease
from pipelines.pretrain import pretrain
from pipelines.stage.lifecycle import folder_input
from pipelines.stage.training import CHECKPOINTS, begin_training


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.integration
@pytest.mark.parametrize("is_begun", [True, False])
def test_a_second_process_on_one_output_leaves_no_trace(stages, tmp_path, monkeypatch, is_begun):
    """Not even of settings that the run at work there could go on with."""
    monkeypatch.setattr(lease, "_ENDING_S", 0.1)
    output, run = tmp_path / "out", stages.recipe.pretrain
    options = {"data": stages.data, "output": str(output), "cluster": stages.cluster, "progress": False}
    if is_begun:
        config, inputs = (
            {"model": stages.recipe.model.content(), **asdict(run)},
            [folder_input("data", stages.data)],
        )
        begin_training("pretrain", str(output), config=config, inputs=inputs, tracker=None, extend=False)
    with Lease(f"{output}/{CHECKPOINTS}"):
        before = content(output)
        changed = replace(run, train=replace(run.train, log_every=7, compile=True))
        with pytest.raises(
            UserError, match=f"trains into {output}/{CHECKPOINTS}: choose another output folder"
        ):
            pretrain(replace(stages.recipe, pretrain=changed), **options)
        assert content(output) == before
