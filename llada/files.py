"""Files at any fsspec URL (local path, s3://, gs://, memory://), written so that a reader never sees half a file, read
whole or by byte ranges.

What a store answers when it fails becomes one line here (`StoreError`, see llada/store_errors.py): by the functions below,
and around everything else that asks a file system, by `storage_errors`. Local files are written under a temporary name and
renamed; object stores publish a put only when it is complete, so there one put is enough. A leftover temporary file starts
with a dot and is ignored by every listing here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import posixpath
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from llada.errors import UserError
from llada.store_errors import StoreError, is_past_the_end, may_pass, no_space, told
from llada.store_errors import is_store_error as is_store_error

T = TypeVar("T")
log = logging.getLogger(__name__)
_PAUSES_S = (1.0, 4.0, 15.0)
# The protocols of fsspec that read what another URL, behind "::", names.
_CHAINING = frozenset(
    ["blockcache", "cached", "dir", "filecache", "libarchive", "reference", "simplecache", "tar", "zip"]
)
# A call that took so long has been repeated often enough, by the store's own client.
_PATIENCE_S = 30.0
_SILENCE_S = 60.0
# Ranges of a file with less than this between them come in one request, which is about what a request costs in time: at
# 20 MB/s a millisecond. One request takes no more than the second, so that several share a large read.
_GAP_BYTES = 1 << 14
_REQUEST_BYTES = 1 << 23
# Less than this free, and an error is put down to it.
_FULL_BYTES = 1 << 20


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path inside it. Listings are never cached: others write too. Calls to S3
    are repeated, with pauses, while it is overloaded or away. Raises UserError for a kind of URL that nobody knows, or
    that needs a package which is not installed, and StoreError when a store refuses the first contact."""
    url = os.fspath(url)
    options: dict[str, Any] = {}
    try:
        if url.startswith(("s3://", "s3a://")):
            _make_s3_patient()
        elif _is_web(url):
            _ = urlsplit(url).port  # which says what is no URL
            options["client_kwargs"] = _web_options()
        if "::" in url and not chain_of(url):
            protocol = fsspec.core.split_protocol(url)[0] or "file"
            kind = fsspec.get_filesystem_class(protocol)
            options |= kind._get_kwargs_from_urls(url)
            return fsspec.filesystem(protocol, use_listings_cache=False, **options), kind._strip_protocol(url)
        return fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:  # names the package
        raise UserError(f"{url}: {error}") from error
    except Exception as error:  # of fsspec alone; it calls some kinds of stores at once
        if (problem := told(error, url)) is not None:
            raise problem from error
        remedy = "give a path of this machine, or s3://, gs://, abfs://, https://"
        raise UserError(f"{url}: {' '.join(str(error).split())}; {remedy}") from error


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


@functools.cache
def _web_options() -> dict[str, Any]:
    """A server may take its time with a large file, but must go on sending. And files come as they are stored: one that
    is called .gz is decompressed by whoever reads it."""
    import aiohttp

    return {
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S),
        "headers": {"Accept-Encoding": "identity"},
        "auto_decompress": False,
    }


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

    s3fs.core.set_custom_error_handler(may_pass)


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """For a `with` block that asks the file system of `url` itself: its failures become a StoreError, one line. That
    nothing is there remains a FileNotFoundError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (problem := told(error, url)) is not None:
            raise problem from error
        if not isinstance(error, FileNotFoundError) and _is_full(
            url
        ):  # torch writes files in C++, which forgets the error's number
            raise no_space(url) from error
        raise


def _is_full(url: str) -> bool:
    path = local_path(url)
    while path and not os.path.exists(path):
        path = os.path.dirname(path)
    if not path:
        return False
    disk = shutil.disk_usage(path)
    return disk.free < _FULL_BYTES < disk.total  # a folder of the kernel has no bytes at all


def with_retries(call: Callable[[], T], url: str, *, outage_s: float = 0.0) -> T:
    """call(), again with pauses while a remote store fails in a way that may pass (beside the retries that s3fs makes
    itself); for `outage_s` also when it goes on failing, which the log then says. Raises StoreError after that, and
    FileNotFoundError when nothing is there."""
    begun = time.monotonic()
    pauses = iter(_PAUSES_S)
    with storage_errors(url):
        while True:
            try:
                return call()
            except NotImplementedError as error:
                raise StoreError(
                    f"{url}: this kind of store cannot do that ({error}); give another place"
                ) from error
            except Exception as error:
                waited, pause = time.monotonic() - begun, next(pauses, None)
                if not may_pass(error) or local_path(url) is not None:
                    raise
                if pause is None or waited > _PATIENCE_S:
                    if waited > outage_s:
                        raise
                    pause = _PAUSES_S[-1]
                    log.warning("waiting since %.0f s: %s", waited, told(error, url) or error)
                time.sleep(pause)


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


def entry_at(url: str) -> dict[str, Any] | None:
    """What stands at `url`, as fsspec describes it: its "type" ("file", "directory"), its "size" (None when a web server
    does not tell), what its store says of its version. None when nothing is there. Raises StoreError."""
    fs, path = filesystem(url)
    try:
        return with_retries(lambda: fs.info(path), url)
    except FileNotFoundError:
        return None


def exists(url: str) -> bool:
    """True when a file or folder stands at `url`. Raises StoreError when its store does not say."""
    path = local_path(url)
    return entry_at(url) is not None if path is None else os.path.exists(path)


def read_bytes(url: str) -> bytes:
    """The whole file. Raises FileNotFoundError naming the URL, StoreError when a folder is there, a file lies in its
    way, or the store does not give it."""
    fs, path = filesystem(url)
    try:
        return with_retries(lambda: fs.cat_file(path), url)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file at {url}") from None


@contextlib.contextmanager
def open_bytes(url: str, start: int = 0) -> Iterator[BinaryIO]:
    """For a `with` block, a file to read once, forwards, from byte `start` on. Web servers need neither tell its size nor
    know ranges. Raises FileNotFoundError naming the URL; what fails while reading is raised as the file system does."""
    fs, path = filesystem(url)
    try:
        if _is_web(url):
            opened = with_retries(lambda: _open_web(fs, path, start), url)
        else:
            opened = with_retries(lambda: fs.open(path, "rb"), url)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file at {url}") from None
    with opened as stream:
        if not _is_web(url):
            stream.seek(start)
        yield stream


def _open_web(fs: Any, path: str, start: int) -> Any:
    """One request, whose answer is read as it comes."""
    stream = fs.open(path, "rb", block_size=0, headers={"Range": f"bytes={start}-"} if start else {})
    while start and stream.r.status != 206 and (skipped := stream.read(min(start, 1 << 20))):
        start -= len(skipped)
    return stream


@contextlib.contextmanager
def open_seekable(url: str) -> Iterator[BinaryIO]:
    """For a `with` block, a file to read at any place; of a web server that knows no ranges, a copy of it. Raises
    FileNotFoundError naming the URL; what fails while reading is raised as the file system does."""
    fs, path = filesystem(url)
    if _is_web(url) and not with_retries(lambda: _knows_ranges(fs, path), url):
        with local_copy(url) as copied, open(copied, "rb") as stream:
            yield stream
        return
    try:
        opened = with_retries(lambda: fs.open(path, "rb"), url)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file at {url}") from None
    with opened as stream:
        yield stream


def _knows_ranges(fs: Any, path: str) -> bool:
    if fs.info(path)["size"] is None:
        return False
    with fs.open(path, "rb", block_size=0, headers={"Range": "bytes=0-0"}) as stream:
        return stream.r.status == 206


@contextlib.contextmanager
def open_text(url: str) -> Iterator[TextIO]:
    """For a `with` block, a UTF-8 text file to read line by line, decompressed as its name says. Raises
    FileNotFoundError naming the URL."""
    fs, path = filesystem(url)
    options: dict[str, Any] = {"block_size": 0} if _is_web(url) else {}
    try:
        opened = with_retries(
            lambda: fs.open(path, "rt", encoding="utf-8-sig", compression="infer", **options), url
        )
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
                with_retries(lambda: fs.info(path), url)
            else:
                here = os.path.join(folder, posixpath.basename(path) or "file")
                with_retries(lambda: fs.get_file(path, here), url)
        except FileNotFoundError:
            raise FileNotFoundError(f"no file at {url}") from None
        yield here


def sha256(url: str) -> str:
    """The hexadecimal SHA-256 of a file of any size."""
    digest = hashlib.sha256()
    with storage_errors(url), open_bytes(url) as stream:
        while data := stream.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def write_bytes(url: str, data: bytes) -> None:
    """Write the whole file at once: after a crash the old content, the new content or nothing is there. Raises
    StoreError."""
    if local_path(url) is None:
        fs, path = filesystem(url)
        _put(lambda: fs.pipe_file(path, data), url)
        return
    with storage_errors(url), writing(url) as path:
        Path(path).write_bytes(data)


def _put(call: Callable[[], None], url: str) -> None:
    try:
        with_retries(call, url)
    except FileNotFoundError as error:
        raise StoreError(f"{url}: nothing can be written there ({error}); give another place") from error


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
            _put(lambda: fs.put_file(temporary, path), url)
        return
    folder, name = os.path.split(target)
    _put(lambda: os.makedirs(folder, exist_ok=True), url)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with storage_errors(url):
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
    if local_path(url) and not os.path.isdir(path):
        return {}
    try:
        entries = with_retries(lambda: fs.find(path, detail=True), url)
    except FileNotFoundError:
        return {}
    root = path.rstrip("/") + "/"
    sizes = {
        name[len(root) :]: int(info["size"] or 0) for name, info in entries.items() if name.startswith(root)
    }
    return {name: size for name, size in sizes.items() if not any(p.startswith(".") for p in name.split("/"))}


# --- Parts of files ---------------------------------------------------------------------------------------------------


def fetch_ranges(ranges: Sequence[tuple[str, int, int]], *, outage_s: float = 0.0) -> list[bytes]:
    """The bytes of (url, start, end) ranges of one file system, fetched together.

    Empty ranges cost no request, and neighbours in a file share one: what lies between them is read too where that is
    less than a request costs. A range that reaches past the end of its file gives what is there. A store that is away is
    waited for as by `with_retries`. Raises FileNotFoundError and StoreError, which name the file.
    """
    requests: list[tuple[str, int, int]] = []
    request_of: dict[int, int] = {}
    for number in sorted(range(len(ranges)), key=lambda number: ranges[number]):
        url, start, end = ranges[number]
        if end <= start:
            continue
        if requests:
            last_url, first, last = requests[-1]
            if url == last_url and start - last <= _GAP_BYTES and max(last, end) - first <= _REQUEST_BYTES:
                requests[-1] = (url, first, max(last, end))
                request_of[number] = len(requests) - 1
                continue
        request_of[number] = len(requests)
        requests.append((url, start, end))
    answers = _fetch(requests, outage_s) if requests else []
    pieces = []
    for number, (_, start, end) in enumerate(ranges):
        if number not in request_of:
            pieces.append(b"")
            continue
        begin = requests[request_of[number]][1]
        pieces.append(answers[request_of[number]][start - begin : end - begin])
    return pieces


def _fetch(requests: Sequence[tuple[str, int, int]], outage_s: float) -> list[bytes]:
    """A request each, side by side; after a failure that may pass only those are made again that have failed."""
    fs, _ = filesystem(requests[0][0])
    answers: list[bytes | None] = [None] * len(requests)

    def ask() -> None:
        missing = [number for number, answer in enumerate(answers) if answer is None]
        urls, starts, ends = zip(*(requests[number] for number in missing), strict=True)
        paths = [fs._strip_protocol(url) for url in urls]
        given = fs.cat_ranges(paths, list(starts), list(ends), on_error="return")
        failures: list[tuple[str, Exception]] = []
        for number, url, answer in zip(missing, urls, given, strict=True):
            if not isinstance(answer, Exception):
                answers[number] = bytes(answer)
            elif is_past_the_end(answer):
                answers[number] = b""
            else:
                failures.append((url, answer))
        if failures:  # one that will not pass before those that may
            url, error = min(failures, key=lambda failure: may_pass(failure[1]))
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"no file at {url}") from None
            with storage_errors(url):
                raise error

    with_retries(ask, requests[0][0], outage_s=outage_s)
    pieces = [answer for answer in answers if answer is not None]
    for (url, start, end), piece in zip(requests, pieces, strict=True):
        if len(piece) > end - start:
            raise StoreError(f"{url}: the server knows no ranges of a file; copy it to another place first")
    return pieces


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
