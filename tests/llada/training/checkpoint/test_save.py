"""Writing checkpoints: what is kept while a run goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llada.training.checkpoint.folder import complete_checkpoints


def test_the_newest_are_kept_and_one_of_each_so_many_steps(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    configs = make_config(checkpoint_every=1, keep_checkpoints=1, keep_every=2)
    run_here(configs, pretrain_folder, tmp_path, stop_at=5)
    assert complete_checkpoints(str(tmp_path)) == [2, 4, 5]
