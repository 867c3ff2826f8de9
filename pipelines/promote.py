"""The command `promote`: which version of a registered model bears an alias, such as the one that is served.

    llada promote RUN --alias champion          a version that is not worse than the one that bears it
    llada promote models:/tiny-sft --roll-back  back to the one before

A version is named by its MLflow run, the folder of its stage, or models:/NAME/VERSION. It is compared by its bound: that of
`llada evaluate` on the same data with the same settings where both have one, else by the validation of their trainings on
the same data. Whoever serves models:/NAME@champion is told of it by `llada deploy`. The order of the versions that bore an
alias is a tag of the registered model, `<alias>.history`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from llada.errors import UserError
from llada.settings import check_limits, limited, require
from pipelines.stage.artifact import read_manifest
from pipelines.stage.command import parse, run_command
from pipelines.stage.delivery import model_version, open_existing
from pipelines.stage.tracking import default_tracking_uri

# What a bound depends on, beside model and data: the parameters of an evaluation that must be the same in both.
_SETTINGS = ("split", "max_rows", "num_samples", "seed", "document_mask")


@dataclass(frozen=True)
class PromoteArgs:
    """Give a model's version an alias, if its bound allows it."""

    run: Annotated[str, tyro.conf.Positional]
    """MLflow run of the training, its output folder, or models:/NAME/VERSION; with --roll-back, models:/NAME will do."""
    alias: str = "champion"
    max_worse: float = limited(0.01, low=0)
    """Nats per token by which its bound may be above that of the version which bears the alias."""
    check: bool = True
    """Compare them. Without it, any version is promoted."""
    roll_back: bool = False
    """Give the alias back to the version that bore it before."""
    tracking_uri: str | None = None
    """MLflow; default $MLFLOW_TRACKING_URI, else an sqlite file beside the output."""

    def __post_init__(self) -> None:
        check_limits(self, "promote")


def main(argv: Sequence[str]) -> None:
    """`llada promote RUN`"""
    args = parse(PromoteArgs, argv, "promote")
    uri = args.tracking_uri or default_tracking_uri("run" if args.run.startswith("models:/") else args.run)
    client = open_existing(uri)
    version = find_version(client, args.run, uri)
    if args.roll_back:
        print(roll_back(client, version.name, args.alias))
    else:
        print(promote(client, version, args.alias, max_worse=args.max_worse if args.check else None))


def find_version(client: Any, run: str, uri: str) -> Any:
    """MLflow's ModelVersion that `run` names (see the top). Raises UserError."""
    if run.startswith("models:/"):
        return model_version(run, uri)
    if "/" in run or "." in run:
        run_id = read_manifest(run)["mlflow_run_id"]
        require(bool(run_id), f"{run} has no MLflow run yet: llada track {run}")
    else:
        run_id = run
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    if not versions:
        raise UserError(
            f"MLflow at {uri} has no model of the run {run_id}: name one of a training that has ended"
        )
    return max(versions, key=lambda found: int(found.version))


def promote(client: Any, version: Any, alias: str, *, max_worse: float | None) -> str:
    """Give `version` the alias; what was done, in a line. `max_worse` is in nats per token, None for no comparison.

    Raises UserError when it is worse than that, or cannot be compared.
    """
    name, new = version.name, str(version.version)
    bearer = _bearer(client, name, alias)
    if bearer is not None and str(bearer.version) == new:
        return f"models:/{name}/{new} bears @{alias} already"
    told = "nothing to compare it with"
    if bearer is not None and max_worse is not None:
        told = compare(client, version, bearer, max_worse)
    elif bearer is not None:
        told = "not compared"
    before = _before(client, name, alias, bearer)
    client.set_registered_model_alias(name, alias, new)
    client.set_registered_model_tag(name, f"{alias}.history", " ".join([*before, new]))
    client.set_model_version_tag(name, new, f"{alias}.check", told)
    return f"models:/{name}@{alias} is version {new} ({told})"


def roll_back(client: Any, name: str, alias: str) -> str:
    """Give the alias back to the version that bore it before; what was done, in a line. Raises UserError."""
    bearer = _bearer(client, name, alias)
    before = _before(client, name, alias, bearer)
    before = before[:-1] if bearer is not None else before
    require(bool(before), f"no version of {name} bore @{alias} before")
    client.set_registered_model_alias(name, alias, before[-1])
    client.set_registered_model_tag(name, f"{alias}.history", " ".join(before))
    gone = f", no longer {bearer.version}" if bearer is not None else ""
    return f"models:/{name}@{alias} is version {before[-1]} again{gone}"


def compare(client: Any, version: Any, bearer: Any, max_worse: float) -> str:
    """Both bounds, in a line. Raises UserError when that of `version` is more than `max_worse` above the bearer's."""
    new, old = bounds(client, version), bounds(client, bearer)
    common = [what for what in new if what in old]
    if not common:
        raise UserError(
            f"versions {version.version} and {bearer.version} of {version.name} have no bound on the same data: llada evaluate "
            f"--model {version.source} and {bearer.source} with the same --data, or promote with --no-check"
        )
    what = common[0]
    told = f"{what[0]} {new[what]:.4f} nats/token on {what[1]}, version {bearer.version} {old[what]:.4f}"
    if new[what] > old[what] + max_worse:
        raise UserError(
            f"models:/{version.name}/{version.version} is worse than --max-worse {max_worse:g} allows: {told}"
        )
    return told


def bounds(client: Any, version: Any) -> dict[tuple[str, ...], float]:
    """{(where it comes from, data, settings …): nats per token} of a version, those to compare by first."""
    run = client.get_run(version.run_id)
    evaluations = client.search_runs(
        [run.info.experiment_id],
        f"tags.stage = 'evaluate' AND tags.`input.model` = '{version.source}' AND attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
    )
    found: dict[tuple[str, ...], float] = {}
    for one in evaluations:
        if (nats := one.data.metrics.get("nats_per_token")) is not None:
            settings = tuple(one.data.params.get(name, "") for name in _SETTINGS)
            found.setdefault(("evaluated", one.data.tags.get("input.data", ""), *settings), nats)
    if (loss := run.data.metrics.get("final.validation_loss")) is not None:
        found[("validation", run.data.tags.get("input.data", ""))] = loss
    return found


def _bearer(client: Any, name: str, alias: str) -> Any:
    """The version that bears the alias, or None."""
    number = client.get_registered_model(name).aliases.get(alias)
    return None if number is None else client.get_model_version(name, str(number))


def _before(client: Any, name: str, alias: str, bearer: Any) -> list[str]:
    """The versions that bore the alias, up to the one that does now, whoever gave it that."""
    history = client.get_registered_model(name).tags.get(f"{alias}.history", "").split()
    if bearer is None:
        return history
    now = str(bearer.version)
    if now in history:
        history = history[: len(history) - 1 - history[::-1].index(now)]
    return [*history, now]


if __name__ == "__main__":
    run_command("promote")
