"""A checkpoint before it is served: what no replica could load is refused, altered files are named, and the fingerprint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llada.errors import UserError
from llada.files import sha256
from pipelines.serving.checkpoint import check_checkpoint, fingerprint, verify_checkpoint


def list_files(folder: Path) -> None:
    """Write the manifest of a checkpoint that a stage of ours has made."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(str(path))}
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


@pytest.fixture
def folder(small_model: Path, tmp_path: Path) -> Path:
    shutil.copytree(small_model, tmp_path / "model")
    list_files(tmp_path / "model")
    return tmp_path / "model"


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def cut_weights_of_nobody(folder: Path) -> None:
    cut_weights(folder)
    (folder / "manifest.json").unlink()


def resize(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"d_model": 48}))
    list_files(folder)


def make_causal(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"causal": True}))
    list_files(folder)


def forget_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "manifest.json").unlink()


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (cut_weights, "model.safetensors has .* bytes; manifest.json lists"),
    (cut_weights_of_nobody, "is damaged"),
    (resize, "has shape .* the config asks for"),
    (make_causal, r"this network is autoregressive \(causal\)"),
    (forget_tokenizer, r"it has no tokenizer\.json"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json"),
]


@pytest.mark.parametrize("damage, message", DAMAGES, ids=[message[:30] for _, message in DAMAGES])
def test_what_no_replica_could_load_is_refused(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    check_checkpoint(str(folder))
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        check_checkpoint(str(folder))
    assert str(caught.value).startswith(f"cannot serve {folder}: ")
    assert "\n" not in str(caught.value)


def test_there_must_be_a_folder(tmp_path: Path) -> None:
    for url in (str(tmp_path / "none"), "memory://none"):
        with pytest.raises(UserError, match=f"cannot serve {url}: no folder at"):
            check_checkpoint(url)


@pytest.mark.parametrize("damage", [None, cut_weights, cut_weights_of_nobody, resize, forget_tokenizer])
def test_a_remote_folder_is_checked_by_its_headers(
    folder: Path, damage: Callable[[Path], None] | None
) -> None:
    import fsspec

    if damage is not None:
        damage(folder)
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/served", recursive=True)
    try:
        if damage is None:
            check_checkpoint("memory://served")
        else:
            with pytest.raises(UserError, match="cannot serve memory://served: "):
                check_checkpoint("memory://served")
    finally:
        memory.rm("/served", recursive=True)


def test_altered_files_are_named(folder: Path) -> None:
    contents = verify_checkpoint(folder)
    assert contents["model.safetensors"] == sha256(str(folder / "model.safetensors"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=r"^model\.safetensors is not the file .* --no-verify-checksums$"):
        verify_checkpoint(folder)
    assert verify_checkpoint(folder, read_weights=False) == contents  # as the manifest has it
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^tokenizer_config\.json is not the file .* folder again$"):
        verify_checkpoint(folder, read_weights=False)


@pytest.mark.parametrize(
    "files", [None, ["config.json"], {"config.json": {"bytes": 3}}, {"config.json": 3}], ids=str
)
def test_a_manifest_of_another_form_is_named(folder: Path, files: object) -> None:
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    for check in (lambda: check_checkpoint(str(folder)), lambda: verify_checkpoint(folder)):
        with pytest.raises(UserError, match=r"manifest\.json does not give bytes and sha256 of each file"):
            check()


def test_without_a_manifest_the_weights_themselves_are_the_fingerprint(small_model: Path) -> None:
    contents = verify_checkpoint(small_model)
    assert contents["model.safetensors"] == sha256(str(small_model / "model.safetensors"))
    assert verify_checkpoint(small_model, read_weights=False)["model.safetensors"].endswith(" bytes")


def test_a_fingerprint_follows_the_files_and_the_settings() -> None:
    contents = {"model.safetensors": "00", "config.json": "11"}
    assert fingerprint(contents, dtype=None) == fingerprint(dict(reversed(contents.items())), dtype=None)
    others = [
        fingerprint(contents, dtype="bfloat16"),
        fingerprint(contents | {"config.json": "22"}, dtype=None),
        fingerprint(contents, dtype=None),
    ]
    assert len(set(others)) == 3
    assert all(len(one) == 15 and one.startswith("fp_") for one in others)
