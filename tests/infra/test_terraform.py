"""The Terraform files: they parse, what they name is declared, and their rights are the least that our pods need.

`terraform validate` wants the providers of a registry; its formatter is asked where the program is.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import hcl2
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "terraform"
TEXT = {path.name: path.read_text() for path in sorted(FOLDER.glob("*.tf"))}
CODE = "\n".join(re.sub(r"#.*", "", text) for text in TEXT.values())


def unquote(value: Any) -> Any:
    """Without the quotation marks that the parser leaves around strings."""
    if isinstance(value, str):
        return value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
    if isinstance(value, dict):
        return {unquote(key): unquote(below) for key, below in value.items() if not key.startswith("__")}
    return [unquote(below) for below in value] if isinstance(value, list) else value


BLOCKS: dict[str, list[Any]] = {}
for _text in TEXT.values():
    for _kind, _blocks in unquote(hcl2.loads(_text)).items():
        BLOCKS.setdefault(_kind, []).extend(_blocks)


def names(kind: str) -> list[str]:
    """`a` of each block `kind "a"`, `a.b` of each `kind "a" "b"`."""
    if kind in ("resource", "data"):
        return [f"{one}.{name}" for block in BLOCKS[kind] for one, below in block.items() for name in below]
    return [name for block in BLOCKS[kind] for name in block]


@pytest.mark.skipif(shutil.which("terraform") is None, reason="needs terraform")
def test_they_are_formatted():
    done = subprocess.run(
        ["terraform", f"-chdir={FOLDER}", "fmt", "-check", "-diff"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_what_is_named_is_declared_once_and_used():
    for kind in ("variable", "output", "module", "locals"):
        assert len(set(names(kind))) == len(names(kind)), kind
    assert set(re.findall(r"\bvar\.(\w+)", CODE)) == set(names("variable"))
    assert set(re.findall(r"\blocal\.(\w+)", CODE)) == set(names("locals"))
    assert set(re.findall(r"\bmodule\.(\w+)", CODE)) == set(names("module"))
    data = set(re.findall(r"\bdata\.(aws_\w+\.\w+)", CODE))
    assert data == set(names("data"))
    resources = set(re.findall(r"(?<![\w.])((?:aws|random)_\w+\.\w+)", CODE))
    assert resources <= set(names("resource"))


def test_readme_asks_for_outputs_that_there_are():
    readme = (ROOT / "infra/README.md").read_text()
    asked = set(re.findall(r"output -raw (\w+)", readme))
    assert asked <= set(names("output"))
    assert {"bucket", "database_host", "database_password", "cluster_name"} <= asked


def policies() -> dict[str, list[dict[str, Any]]]:
    found = {}
    for block in BLOCKS["data"]:
        for name, document in block.get("aws_iam_policy_document", {}).items():
            found[name] = document["statement"]
    return found


def test_no_right_is_given_to_everything():
    allowed = [
        statement
        for statements in policies().values()
        for statement in statements
        if statement.get("effect", "Allow") == "Allow" and "principals" not in statement
    ]
    assert len(allowed) >= 4
    for statement in allowed:
        assert not [action for action in statement["actions"] if "*" in action], statement
        # What only describes knows no resources; what changes something is held to this cluster by its tag.
        is_only_looking = all(re.match(r"\w+:(Describe|Get)", action) for action in statement["actions"])
        assert statement["resources"] != ["*"] or is_only_looking or "condition" in statement
    objects = next(statement for statement in policies()["bucket"] if statement["sid"] == "Objects")
    assert all(action.startswith("s3:") and "Bucket" not in action for action in objects["actions"])


def test_nobody_is_let_in_from_everywhere():
    (admins,) = (block["admin_cidrs"] for block in BLOCKS["variable"] if "admin_cidrs" in block)
    assert "default" not in admins
    assert "0.0.0.0/0" not in CODE.replace(admins["description"], "")
    (bucket,) = (
        below["data"]
        for block in BLOCKS["resource"]
        for kind, below in block.items()
        if kind == "aws_s3_bucket_public_access_block"
    )
    assert [value for name, value in bucket.items() if name != "bucket"] == [True] * 4


def test_pods_and_machines_are_called_what_the_manifests_call_them():
    given = set(re.findall(r'service_account\s+= "([\w-]+)"', CODE))
    accounts = {
        document["metadata"]["name"]
        for document in yaml.safe_load_all((ROOT / "infra/kubernetes/access.yaml").read_text())
        if document["kind"] == "ServiceAccount"
    }
    helm = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "infra/helm").glob("*.yaml")}
    accounts |= {
        helm["mlflow"]["serviceAccount"]["name"],
        helm["cluster-autoscaler"]["rbac"]["serviceAccount"]["name"],
    }
    assert given - {"ebs-csi-controller-sa"} == accounts - {"llada-scheduler"}  # which needs no bucket
    pools = set(re.findall(r'"llada/pool"\s+= "(\w+)"', CODE))
    asked = {
        pool
        for path in (ROOT / "infra").rglob("*.yaml")
        for pool in re.findall(r"llada/pool: (\w+)", path.read_text())
    }
    assert asked == pools
    (version,) = (
        block["kubernetes_version"] for block in BLOCKS["variable"] if "kubernetes_version" in block
    )
    assert version["default"] == "1.34"  # whose schemas test_kubernetes.py takes
