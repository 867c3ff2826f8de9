"""The hub's data sets: real rows come over HTTP by the real client, and what does not come is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llada.errors import UserError
from llada.evals.benchmarks.hub import data_errors

ROOT = Path(__file__).resolve().parents[4]
FOLDER = "put its rows into a folder and name that with --benchmarks.data"
# In a process of its own: where the hub is, its client reads when it is imported.
ASK = """
import json, sys
from functools import partial
from llada.errors import UserError
from llada.evals.benchmarks.config import BenchmarkConfig
from llada.evals.benchmarks.run import run_benchmarks
from llada.evals.evaluation import EvaluateConfig, Evaluation
from llada.evals.requests.worker import open_folder

model, output, *names = sys.argv[1:]
for name in names:
    config = BenchmarkConfig((name,), num_fewshot=2, limit=2, gen_length=4)
    evaluation = Evaluation(
        EvaluateConfig(benchmarks=config), model, partial(open_folder, model, None, None), None, output,
        lambda build, blocks, *, folder: map(build(), blocks), lambda: model,
    )
    try:
        print(json.dumps(run_benchmarks(evaluation)["benchmarks"][name]["items"]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def ask(model: str, output: Path, names: list[str], environment: dict[str, str]) -> list[Any]:
    own = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_HOME": str(output / "home"),
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK, model, str(output), *names],
        capture_output=True, text=True, env=own, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.integration
def test_rows_come_from_the_hub_and_what_does_not_is_told(
    hub: tuple[str, list[str]], data: Path, save_checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    address, asked = hub
    model = save_checkpoint(tmp_path / "model", context=128)
    items, gated, forbidden, missing = ask(
        model, tmp_path, ["gsm8k", "gpqa", "piqa", "winogrande"], {"HF_ENDPOINT": address}
    )
    assert items == 2
    assert any("openai/gsm8k/resolve" in path and path.endswith("main/test.jsonl") for path in asked)
    line = json.loads((tmp_path / "benchmarks/gsm8k.jsonl").read_text().splitlines()[1])
    assert line["doc"] == json.loads((data / "gsm8k.jsonl").read_text().splitlines()[1])
    # Two examples of the hub's other file stand before the question.
    prompt = line["arguments"][0][0]
    pool = [json.loads(row) for row in (data / "gsm8k.fewshot.jsonl").read_text().splitlines()]
    assert sum(f"Question: {row['question']}\nAnswer: {row['answer']}" in prompt for row in pool) == 2
    assert gated == (
        "the data of gpqa cannot be had: Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub. You must be authenticated to "
        f"access it; accept its terms on its page there and set HF_TOKEN, or {FOLDER}"
    )
    assert forbidden.startswith("the data of piqa cannot be had: ")
    assert missing.startswith("the data of winogrande cannot be had: Dataset ")
    assert missing.endswith(f"doesn't exist on the Hub or cannot be accessed; {FOLDER}")
    for told in (gated, forbidden, missing):
        assert "\n" not in told


@pytest.mark.slow
@pytest.mark.integration
def test_what_has_come_stays(
    hub: tuple[str, list[str]], save_checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    """It is read without the hub, and what has not come is not waited for."""
    model = save_checkpoint(tmp_path / "model", context=128)
    assert ask(model, tmp_path, ["gsm8k"], {"HF_ENDPOINT": hub[0]}) == [2]
    items, offline = ask(model, tmp_path, ["gsm8k", "gpqa"], {"HF_HUB_OFFLINE": "1"})
    assert items == 2
    assert offline.endswith(f"(OfflineModeIsEnabled); unset HF_HUB_OFFLINE, or {FOLDER}")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub"),
            r"on the Hub; try again where there is a network",
        ),
        (FileNotFoundError("no file\nat /x."), r"the data of toy cannot be had: no file at /x$"),
    ],
    ids=str,
)
def test_a_failure_is_one_line(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=message) as caught, data_errors("toy", takes_folder=False):
        raise error
    assert "\n" not in str(caught.value)
    assert "--benchmarks.data" not in str(caught.value)


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(KeyError), data_errors("toy", takes_folder=True):
        raise KeyError("ours")
