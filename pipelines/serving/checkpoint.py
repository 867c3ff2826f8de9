"""What is served: a checkpoint folder, checked before anything is begun with it, and the fingerprint of its answers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import llada
from llada.data.tokens.manifest import FileEntry
from llada.errors import UserError
from llada.files import fetch_ranges, file_sizes, filesystem, join, local_path, sha256
from llada.model.transformer import ModelConfig
from llada.sampling.config import SamplingConfig
from llada.sampling.forward import check_network
from llada.tokenizer import has_tokenizer
from pipelines.stage.artifact import fetch_folder, find_manifest

# What decides a reply, beside the weights.
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_SMALL_BYTES = 100 << 20
_CODE = ("model", "diffusion", "sampling")


def check_checkpoint(url: str) -> ModelConfig:
    """Refuse a folder that no replica could load: config, tokenizer, and the names, shapes and sizes of the weights. The
    model's configuration.

    The weights themselves are not read; of a remote folder only their headers are fetched.
    """
    with naming(url):
        if local_path(url) is not None:
            return _check(fetch_folder(url))
        with tempfile.TemporaryDirectory() as sketch:
            _draw(url, Path(sketch))
            return _check(Path(sketch))


def verify_checkpoint(folder: Path, *, read_weights: bool = True) -> dict[str, str]:
    """{name: SHA-256} of the files that decide a reply.

    Args:
        read_weights: False trusts what the manifest says of the weights; without a manifest their sizes stand for them.

    Raises:
        UserError: a file is another than the folder's manifest says.
    """
    listed = {name: entry["sha256"] for name, entry in _listed(folder).items()}
    contents = {}
    for name, size in sorted(file_sizes(str(folder)).items()):
        if not (name in _SETTINGS or name in listed or ("/" not in name and name.endswith(_WEIGHTS))):
            continue
        if name.endswith(".safetensors") and not read_weights:
            contents[name] = listed.get(name, f"{size} bytes")
            continue
        contents[name] = sha256(join(str(folder), name))
        if contents[name] != listed.get(name, contents[name]):
            way_around = (
                ", or serve it as it is with --no-verify-checksums" if name.endswith(".safetensors") else ""
            )
            raise UserError(
                f"{name} is not the file that manifest.json lists (another checksum): copy or download the folder "
                f"again{way_around}"
            )
    return contents


def fingerprint(contents: Mapping[str, str], **settings: Any) -> str:
    """OpenAI's system_fingerprint: equal when the checkpoint's files, the settings and the code of the sampler are."""
    digest = hashlib.sha256(json.dumps([contents, settings], sort_keys=True, default=str).encode())
    package = Path(llada.__file__).parent
    for source in sorted(path for room in _CODE for path in (package / room).rglob("*.py")):
        digest.update(source.read_bytes())
    return f"fp_{digest.hexdigest()[:12]}"


@contextlib.contextmanager
def naming(url: str) -> Iterator[None]:
    """UserErrors name the checkpoint that cannot be served."""
    try:
        yield
    except UserError as error:
        raise UserError(f"cannot serve {url}: {error}") from error


def _check(folder: Path) -> ModelConfig:
    sizes = file_sizes(str(folder))
    for name, entry in _listed(folder).items():
        if sizes.get(name) != entry["bytes"]:
            there = "is missing" if name not in sizes else f"has {sizes[name]:,} bytes"
            raise UserError(
                f"{name} {there}; manifest.json lists {entry['bytes']:,} bytes: copy the folder again"
            )
    model, _ = llada.load(folder)  # maps the weights, and reads none of them
    if not has_tokenizer(folder):
        raise UserError("it has no tokenizer.json")
    check_network(model, SamplingConfig())
    return model.config


def _listed(folder: Path) -> dict[str, FileEntry]:
    """The files of the folder as its manifest has them; none where no stage of ours made it."""
    manifest = find_manifest(str(folder))
    files = manifest.get("files", {}) if manifest else {}
    try:
        return {name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in files.items()}
    except (AttributeError, TypeError, KeyError):
        raise UserError(
            "manifest.json does not give bytes and sha256 of each file: copy the folder again, or delete the manifest "
            "to serve it unchecked"
        ) from None


def _draw(url: str, folder: Path) -> None:
    """The remote folder's small files, and its weight files as holes behind their headers, at which the loader looks."""
    fs, root = filesystem(url)
    sizes = {name: size for name, size in file_sizes(url).items() if "/" not in name}
    if not sizes:
        raise UserError(f"no folder at {url}")
    for name, size in sizes.items():
        if name.endswith(".safetensors"):
            source = join(url, name)
            (length,) = fetch_ranges([(source, 0, min(8, size))])
            header = min(8 + int.from_bytes(length, "little"), size, _SMALL_BYTES)
            with (folder / name).open("wb") as file:
                file.writelines(fetch_ranges([(source, 0, header)]))
                file.truncate(size)
        elif size <= _SMALL_BYTES:
            fs.get_file(join(root, name), str(folder / name))
