"""The champion of a registered model, on a real MLflow (sqlite): who may become it, and the way back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llada.errors import UserError
from pipelines.promote import bounds, compare
from pipelines.stage.artifact import read_manifest, to_json
from pipelines.stage.delivery import Delivery, model_folder, open_client

Command = Callable[..., tuple[int, str, str]]
DATA = "s3://bucket/data/snapshots/0000"


@pytest.fixture(scope="module")
def mlflow(database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a database of its own."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    shutil.copy(database, path)
    return f"sqlite:///{path}"


def train(uri: str, name: str, folder: Path, validation: float, *, data: str = DATA) -> Delivery:
    """A training that has registered its folder as the next version of a model."""
    run = Delivery(uri, str(folder))
    run.open("a training", {"stage": "sft", "output": str(folder)})
    run(("input", {"url": data, "context": "data", "digest": "d", "producer": ""}))
    run(("metrics", {"values": {"final.validation_loss": validation}, "step": 0, "timestamp": 1}))
    run(("model", {"name": name, "url": str(folder), "step": 3}))
    run(("end", {"status": "FINISHED"}))
    return run


def evaluate(uri: str, folder: Path, output: Path, nats: float, *, data: str = DATA, rows: int = 100) -> None:
    """An evaluation of the checkpoint `folder`."""
    run = Delivery(uri, str(output))
    run.open("an evaluation", {"stage": "evaluate", "output": str(output)})
    run(("params", {"values": {"split": "validation", "max_rows": str(rows)}}))
    run(("input", {"url": str(folder), "context": "model", "digest": "d", "producer": ""}))
    run(("input", {"url": data, "context": "data", "digest": "d", "producer": ""}))
    run(("metrics", {"values": {"nats_per_token": nats}, "step": 0, "timestamp": 1}))
    run(("end", {"status": "FINISHED"}))


def test_a_champion_and_its_successors(mlflow, tmp_path, llada: Command):
    """The first is taken as it is; a worse one is refused, a better one is not; and the way back, twice."""
    folders = [tmp_path / name for name in "abc"]
    runs = [train(mlflow, "m", folder, nats) for folder, nats in zip(folders, (3.5, 3.6, 3.4), strict=True)]

    def llada_promote(*words: str) -> tuple[int, str, str]:
        return llada("promote", *words, "--tracking-uri", mlflow)

    def champion() -> str:
        return model_folder("models:/m@champion", mlflow)

    code, out, err = llada_promote("models:/m/1")
    assert (code, out) == (0, "models:/m@champion is version 1 (nothing to compare it with)\n"), err
    code, out, err = llada_promote(runs[1].run_id)
    assert (code, out) == (1, "")
    assert err.startswith(
        "llada promote: models:/m/2 is worse than --max-worse 0.01 allows: validation 3.6000 nats/token on "
        f"{DATA}, version 1 3.5000"
    )
    assert champion() == str(folders[0])
    # By its folder; and as much worse as is allowed.
    folders[1].mkdir(exist_ok=True)
    (folders[1] / "manifest.json").write_bytes(to_json({"mlflow_run_id": runs[1].run_id}))
    code, out, err = llada_promote(str(folders[1]), "--max-worse", "0.1001")
    assert code == 0, err
    assert champion() == str(folders[1])
    assert llada_promote("models:/m/3")[0] == 0
    assert llada_promote("models:/m/3")[1] == "models:/m/3 bears @champion already\n"
    assert champion() == str(folders[2])

    code, out, _ = llada_promote("models:/m", "--roll-back")
    assert (code, out) == (0, "models:/m@champion is version 2 again, no longer 3\n")
    assert llada_promote("models:/m", "--roll-back")[1].startswith("models:/m@champion is version 1 again")
    assert champion() == str(folders[0])
    code, _, err = llada_promote("models:/m", "--roll-back")
    assert (code, err) == (1, "llada promote: no version of m bore @champion before\n")
    # By a person's hand, who knows of no history.
    runs[0].client.set_registered_model_alias("m", "champion", "3")
    assert llada_promote("models:/m/1", "--no-check")[0] == 0
    assert llada_promote("models:/m", "--roll-back")[1].startswith("models:/m@champion is version 3 again")


def test_bounds_are_of_the_same_data_and_settings(mlflow, tmp_path):
    """An evaluation goes before what trainings say of themselves, if both were evaluated in the same way."""
    folders = [tmp_path / name for name in "ab"]
    client = None
    for folder, nats, data in zip(folders, (3.0, 2.0), (DATA, "s3://other"), strict=True):
        client = train(mlflow, "n", folder, nats, data=data).client
    old, new = (client.get_model_version("n", number) for number in ("1", "2"))
    with pytest.raises(
        UserError,
        match=f"versions 2 and 1 of n have no bound on the same data: llada evaluate .*{folders[1]}",
    ):
        compare(client, new, old, 0.0)
    evaluate(mlflow, folders[0], tmp_path / "e", 3.2)
    evaluate(mlflow, folders[1], tmp_path / "f", 3.1, rows=50)
    with pytest.raises(UserError, match="no bound on the same data"):
        compare(client, new, old, 0.0)
    evaluate(mlflow, folders[1], tmp_path / "g", 3.3)
    assert sorted(bounds(client, new).values()) == [2.0, 3.1, 3.3]
    with pytest.raises(UserError, match="evaluated 3.3000 nats/token on .*, version 1 3.2000"):
        compare(client, new, old, 0.05)
    assert compare(client, new, old, 0.2).startswith("evaluated 3.3000")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["models:/none/1"], "no models:/none/1 in MLflow"),
        (["0123456789abcdef"], "has no model of the run 0123456789abcdef"),
        (["./none"], "no manifest.json at ./none"),
    ],
)
def test_what_cannot_be_promoted(mlflow, tmp_path, llada: Command, words, message):
    Delivery(mlflow, str(tmp_path)).open("a run", {})
    code, out, err = llada("promote", *words, "--tracking-uri", mlflow)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert message in err


def test_without_a_database_there_is_nothing(tmp_path, llada: Command):
    code, _, err = llada("promote", "models:/m/1", "--tracking-uri", f"sqlite:///{tmp_path / 'none.db'}")
    assert code == 1
    assert "there is no MLflow database" in err
    assert not (tmp_path / "none.db").exists()


@pytest.mark.integration
def test_a_training_has_the_bound_that_is_compared(stages):
    """Under the name that it is looked for."""
    client = open_client(f"sqlite:///{stages.root / 'mlflow.db'}")
    (version,) = client.search_model_versions("name = 'llada-sft'")
    assert bounds(client, version) == {
        ("validation", f"{stages.sft_data}/snapshots/0000"): read_manifest(stages.model)["counts"][
            "validation_loss"
        ]
    }
