"""Files at any fsspec URL (local path, s3://, gs://, memory://), written so that a reader never sees half a file, read
whole or by byte ranges.

Local files are written under a temporary name and renamed; object stores publish a put only when it is complete,
so there one put is enough. A leftover temporary file starts with a dot and is ignored by every listing here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import posixpath
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from llada.errors import UserError

T = TypeVar("T")
_PAUSES_S = (1.0, 4.0, 15.0)
# The protocols of fsspec that read what another URL, behind "::", names.
_CHAINING = frozenset(
    ["blockcache", "cached", "dir", "filecache", "libarchive", "reference", "simplecache", "tar", "zip"]
)
_STORE_PACKAGES = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "adlfs")


def is_store_error(error: BaseException) -> bool:
    """Whether a file system failed, rather than our code; some stores' errors are no OSError."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _STORE_PACKAGES


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path inside it. Listings are never cached: others write too. Calls to S3
    are repeated, with pauses, while it is overloaded or away. Raises UserError for a kind of URL that nobody knows, or
    that needs a package which is not installed."""
    url = os.fspath(url)
    try:
        if url.startswith(("s3://", "s3a://")):
            _make_s3_patient()
        if "::" in url and not chain_of(url):
            protocol = fsspec.core.split_protocol(url)[0] or "file"
            kind = fsspec.get_filesystem_class(protocol)
            options = kind._get_kwargs_from_urls(url)
            return fsspec.filesystem(protocol, use_listings_cache=False, **options), kind._strip_protocol(url)
        return fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:  # names the package
        raise UserError(f"{url}: {error}") from error
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise
        raise UserError(f"{url}: {error}") from None


def chain_of(url: str) -> str:
    """What stands behind the path in the URL of a file in an archive or cache, "::s3://bucket/a.zip" of
    "zip://a.txt::s3://bucket/a.zip"; "" for any other URL, whose "::" belongs to a name."""
    outer, separator, inner = url.partition("::")
    return separator + inner if outer.split("://")[0] in _CHAINING else ""


@functools.cache
def _make_s3_patient() -> None:
    """Let s3fs repeat a call also after a connection that was refused or an answer 5xx: with botocore's repetitions
    inside of its own a call then lasts half a minute on average before it fails."""
    import s3fs
    from botocore.exceptions import ClientError, ConnectionError

    def is_passing(error: Exception) -> bool:
        if isinstance(error, ClientError):
            return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500
        return isinstance(error, ConnectionError)

    s3fs.core.set_custom_error_handler(is_passing)


def with_retries(call: Callable[[], T], url: str) -> T:
    """call(), again with pauses while a remote store fails (beside the retries that s3fs makes itself)."""
    for pause in _PAUSES_S:
        try:
            return call()
        except Exception as error:
            final = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
            if isinstance(error, final) or not is_store_error(error) or local_path(url):
                raise
            time.sleep(pause)
    return call()


def local_path(url: str) -> str | None:
    """The path on this machine behind `url`, or None when the URL is remote."""
    fs, path = filesystem(url)
    return path if isinstance(fs, LocalFileSystem) else None


def absolute(url: str) -> str:
    """`url`, a local path made absolute: workers on this machine may run in another directory."""
    path = local_path(url)
    return url if path is None else path


def join(url: str, *names: str) -> str:
    """`url/name/...` with exactly one slash between the parts; a name may go up ("../a")."""
    joined = "/".join([os.fspath(url).rstrip("/"), *(name.strip("/") for name in names)])
    if not any(piece in (".", "..") for name in names for piece in name.split("/")):
        return joined
    protocol, separator, path = joined.rpartition("://")
    return protocol + separator + posixpath.normpath(path)


def exists(url: str) -> bool:
    """True when a file or folder stands at `url`."""
    fs, path = filesystem(url)
    return bool(fs.exists(path))


def read_bytes(url: str) -> bytes:
    """The whole file. Raises FileNotFoundError naming the URL, UserError when a folder is there or a file lies in its way."""
    fs, path = filesystem(url)
    try:
        return with_retries(lambda: fs.cat_file(path), url)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file at {url}") from None
    except IsADirectoryError:
        raise UserError(f"{url} is a folder; give a file") from None
    except NotADirectoryError:
        raise UserError(f"there is no {url}: a file stands where its folder should be") from None


@contextlib.contextmanager
def open_text(url: str) -> Iterator[TextIO]:
    """For a `with` block, a UTF-8 text file to read line by line, decompressed as its name says. Raises
    FileNotFoundError naming the URL."""
    fs, path = filesystem(url)
    try:
        opened = with_retries(lambda: fs.open(path, "rt", encoding="utf-8", compression="infer"), url)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file at {url}") from None
    with opened as stream:
        yield stream


@contextlib.contextmanager
def local_copy(url: str) -> Iterator[str]:
    """For a `with` block, the path of a file on this machine: the file itself, or a copy of a remote one. Raises
    FileNotFoundError naming the URL."""
    fs, path = filesystem(url)
    with tempfile.TemporaryDirectory() as folder:
        here = path
        try:
            if local_path(url) is not None:
                fs.info(path)
            else:
                here = os.path.join(folder, posixpath.basename(path))
                with_retries(lambda: fs.get_file(path, here), url)
        except FileNotFoundError:
            raise FileNotFoundError(f"no file at {url}") from None
        yield here


def sha256(url: str) -> str:
    """The hexadecimal SHA-256 of a file of any size."""
    fs, path = filesystem(url)
    with fs.open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_bytes(url: str, data: bytes) -> None:
    """Write the whole file at once: after a crash the old content, the new content or nothing is there."""
    if local_path(url) is None:
        fs, path = filesystem(url)
        with_retries(lambda: fs.pipe_file(path, data), url)
        return
    with writing(url) as path:
        Path(path).write_bytes(data)


@contextlib.contextmanager
def writing(url: str) -> Iterator[str]:
    """For a `with` block, the path of a local file to fill. At its end that is the file at `url`, as with `write_bytes`;
    after an error nothing is changed there."""
    target = local_path(url)
    if target is None:
        fs, path = filesystem(url)
        with tempfile.TemporaryDirectory() as folder:
            temporary = os.path.join(folder, "file")
            yield temporary
            with_retries(lambda: fs.put_file(temporary, path), url)
        return
    folder, name = os.path.split(target)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def file_sizes(url: str) -> dict[str, int]:
    """{path relative to the folder: bytes} of every file below `url`; empty when there is no such folder.

    Hidden files (and files in hidden folders) are left out.
    """
    fs, path = filesystem(url)
    try:
        entries = fs.find(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    root = path.rstrip("/") + "/"
    sizes = {name[len(root) :]: int(info["size"]) for name, info in entries.items() if name.startswith(root)}
    return {name: size for name, size in sizes.items() if not any(p.startswith(".") for p in name.split("/"))}


# --- Parts of files ---------------------------------------------------------------------------------------------------


def fetch_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """The bytes of (url, start, end) ranges of one file system, fetched together; empty ranges cost no request.

    A range that reaches past the end of its file gives what is there. Raises FileNotFoundError.
    """
    asked = [(url, start, end) for url, start, end in ranges if end > start]
    if not asked:
        return [b""] * len(ranges)
    fs, _ = filesystem(asked[0][0])
    paths = [fs._strip_protocol(url) for url, _, _ in asked]
    starts, ends = [start for _, start, _ in asked], [end for _, _, end in asked]
    pieces = with_retries(lambda: fs.cat_ranges(paths, starts, ends, on_error="raise"), asked[0][0])
    fetched = iter(pieces)
    return [bytes(next(fetched)) if end > start else b"" for _, start, end in ranges]


class TensorPlace(NamedTuple):
    """Where a tensor lies in a safetensors file: bytes start .. end - 1 from the beginning of the file."""

    dtype: str
    """As safetensors spells it: "U32"."""
    shape: tuple[int, ...]
    start: int
    end: int


def safetensors_layout(head: bytes) -> tuple[dict[str, str], dict[str, TensorPlace]]:
    """(metadata, {tensor: its place}) from the first bytes of a safetensors file: u64 size of the header, the header.

    Raises ValueError when that is no such file, or `head` ends inside the header.
    """
    size = int.from_bytes(head[:8], "little")
    try:
        header = json.loads(head[8 : 8 + size])
        metadata = header.pop("__metadata__", {})
        places = {
            name: TensorPlace(
                tensor["dtype"],
                tuple(tensor["shape"]),
                8 + size + tensor["data_offsets"][0],
                8 + size + tensor["data_offsets"][1],
            )
            for name, tensor in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no safetensors header: {error}") from None
    return metadata, places
