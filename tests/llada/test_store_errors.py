"""What stores answer when they fail, from real servers and disks: one line with the URL, the cause and the remedy."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llada import files
from llada.data.outcomes import Rejects, Report
from llada.data.read import documents
from llada.data.read.documents import UnreadableFileError, patiently, read, read_documents
from llada.data.read.listing import list_inputs
from llada.data.read.parts import ReadOptions
from llada.data.work.units import cut_file
from llada.errors import UserError
from llada.files import (
    entry_at,
    exists,
    fetch_ranges,
    file_sizes,
    filesystem,
    local_copy,
    open_text,
    read_bytes,
    sha256,
    storage_errors,
    write_bytes,
)
from llada.settings import load_yaml
from llada.store_errors import StoreError, is_store_error, may_pass, reason, told


def read_text(url: str) -> None:
    with open_text(url):
        pass


def copy(url: str) -> None:
    with local_copy(url):
        pass


CALLS = {
    "read": read_bytes,
    "list": lambda url: list(list_inputs([url])),
    "text": read_text,
    "copy": copy,
    "hash": sha256,
    "exists": exists,
    "settings": lambda url: load_yaml(url, "cluster file"),
    "write": lambda url: write_bytes(url, b"x"),
}


def line_of(call, url: str) -> str:
    with pytest.raises(UserError) as raised:
        call(url)
    line = str(raised.value)
    assert url in line
    assert "\n" not in line
    return line


@pytest.fixture
def impatient(monkeypatch):
    """Without the pauses; how often a call is made stays the same."""
    monkeypatch.setattr(files, "_PAUSES_S", (0.01, 0.01, 0.01))


@pytest.fixture
def at_once(monkeypatch) -> Callable[[], AbstractContextManager[None]]:
    """at_once(): a `with` block in which no call is made again behind one of the pauses, which are long."""
    monkeypatch.setattr(files, "_PAUSES_S", (60.0, 60.0, 60.0))
    monkeypatch.setattr(documents, "_BACK_OFF_S", 60.0)

    @contextlib.contextmanager
    def look() -> Iterator[None]:
        begun = time.monotonic()
        yield
        assert time.monotonic() - begun < 30

    return look


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("401", "it asks for a login"),
        ("403", "access was denied .403.; check the credentials"),
        ("410", "gone for good"),
        ("circle", "it redirects without an end; correct the URL"),
        ("elsewhere", "it redirects to a place that cannot be read: ftp://nowhere"),
    ],
)
def test_what_a_web_server_refuses_is_told_at_once(web_server, folder, words, call):
    server = web_server({})
    line = line_of(CALLS[call], f"{server.url}/{folder}/a.jsonl")
    assert re.search(words, line)
    # HEAD and GET; a circle is followed ten times.
    assert server.asked <= (2 if folder.isdigit() else 20)


def test_what_may_pass_is_tried_again(web_server, impatient):
    server = web_server({"a.jsonl": b'{"text": "a"}\n'})
    for folder, words in (
        ("500", r"failed \(500\)"),
        ("503", r"failed \(503\)"),
        ("429", "too often"),
        ("cut", "broke off"),
    ):
        server.asked = 0
        line = line_of(read_bytes, f"{server.url}/{folder}/a.jsonl")
        assert re.search(words, line)
        assert "run the same command again later" in line
        assert server.asked == 4


def test_nothing_answers(impatient):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert "nothing answers" in line_of(read_bytes, f"http://127.0.0.1:{port}/a.jsonl")


def test_there_is_no_such_host(at_once):
    for call in CALLS.values():
        with at_once():
            line = line_of(call, "http://no-such-host.invalid/a.jsonl")
        assert "there is no host no-such-host.invalid" in line


def test_the_hub_does_not_answer(monkeypatch, impatient):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    filesystem("hf://datasets/a/b")[0].clear_instance_cache()
    line = line_of(lambda url: list(list_inputs([url])), "hf://datasets/a/b/c.jsonl")
    assert "check the URL" in line


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_a_certificate_that_nobody_knows(web_server, tmp_path):
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    made = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 2 -subj /CN=localhost"
    subprocess.run(made.split(), check=True, capture_output=True)
    server = web_server({}, (certificate, key))
    url = f"https://127.0.0.1:{server.server_port}/plain/a.jsonl"
    assert "the TLS connection failed: self-signed certificate; trust its certificate" in line_of(
        read_bytes, url
    )


def test_urls_of_no_store():
    for url, words in (
        ("foo://x/a.jsonl", "Protocol not known: foo; give a path of this machine, or s3://"),
        ("http://[x/a.jsonl", "Invalid IPv6 URL"),
        ("ftp://127.0.0.1:9/a.jsonl", "nothing answers: Connection refused"),
        ("hdfs://host/a.jsonl", ""),
    ):
        for call in CALLS.values():
            assert words in line_of(call, url)
    with pytest.raises(UserError, match="give a path of this machine"):
        filesystem("github://owner/repo")


WEB_ROWS = b"".join(b'{"text": "row %d of %s"}\n' % (number, b"the web " * 100) for number in range(16_000))


@pytest.mark.parametrize("folder", ["plain", "chunked", "ranges", "redirect"])
def test_a_web_server_need_know_neither_sizes_nor_ranges(web_server, folder):
    """Of files that are larger than what is fetched at once (5 MB), in parts where their size is known."""
    table = io.BytesIO()
    pq.write_table(pa.table({"text": [f"row {number}" for number in range(1000)]}), table, row_group_size=100)
    web = web_server({"a.jsonl": WEB_ROWS, "b.parquet": table.getvalue()})
    listed = list(list_inputs([f"{web.url}/{folder}/a.jsonl", f"{web.url}/{folder}/b.parquet"]))
    sizes = [None, None] if folder == "chunked" else [len(WEB_ROWS), len(table.getvalue())]
    assert [file.size for file in listed] == sizes
    parts = [part for file in listed for part in cut_file(file, 6_000_000)]
    assert len(parts) == (2 if folder == "chunked" else 4)
    report, rejects = Report(), Rejects()
    texts = [document.text for document in read(parts, read_documents, ReadOptions(), report, rejects)]
    assert texts[:16_000] == [json.loads(line)["text"] for line in WEB_ROWS.splitlines()]
    assert texts[16_000:] == [f"row {n}" for n in range(1000)]
    assert not rejects.counts
    assert read_bytes(f"{web.url}/{folder}/a.jsonl") == WEB_ROWS


def test_a_piece_of_a_file_is_never_taken_for_another(web_server):
    web = web_server({"a": bytes(range(100))})
    assert fetch_ranges([(f"{web.url}/ranges/a", 10, 20)]) == [bytes(range(10, 20))]
    with pytest.raises(StoreError, match="/plain/a: the server knows no ranges of a file; copy it"):
        fetch_ranges([(f"{web.url}/plain/a", 10, 20)])


def test_a_compressed_file_of_the_web_comes_as_it_is_stored(web_server):
    web = web_server({"a.jsonl": b'{"text": "a"}\n'})
    assert entry_at(f"{web.url}/plain/a.jsonl")["size"] == 14
    assert entry_at(f"{web.url}/plain/none") is None
    assert not exists(f"{web.url}/404/none")
    with pytest.raises(FileNotFoundError, match="no file at http://"):
        read_bytes(f"{web.url}/plain/none")


def test_a_file_that_cannot_be_had_is_given_up_at_once_and_says_why(web_server, at_once):
    web = web_server({"a.jsonl": b'{"text": "a"}\n'})
    (file,) = list_inputs([f"{web.url}/plain/a.jsonl"])
    del web.files["a.jsonl"]
    (part,) = cut_file(file, 1000)
    refused = part.__class__(
        file.__class__(f"{web.url}/403/a.jsonl", "a.jsonl", file.size, file.identity), part.size
    )

    def work(skip):
        return list(read([refused], read_documents, ReadOptions(), Report(), Rejects(), skip=skip))

    with at_once():
        assert patiently(work) == ([], {refused.label: "access was denied (403)"})
    with pytest.raises(UnreadableFileError, match="/403/a.jsonl cannot be read: access was denied"):
        work(frozenset())


# --- S3 -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def s3_of(monkeypatch):
    """s3_of(endpoint, **environment): where s3fs looks from here on."""
    import s3fs

    def use(endpoint: str, **environment: str | None) -> None:
        given = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
        }
        for name, value in {**given, **environment}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()

    yield use
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("bucket", "words"),
    [
        ("denied", "access was denied .403.; check the credentials"),
        ("wrong-key", "the credentials are wrong: InvalidAccessKeyId it is; correct AWS_ACCESS_KEY_ID"),
        ("expired", "the credentials have expired or are not accepted: ExpiredToken it is; get new ones"),
        ("no-bucket", "there is no such bucket; correct the name, or create it"),
        ("moved", "the bucket is in another region or store: .*eu-west-1; set AWS_REGION"),
    ],
)
def test_what_s3_refuses_is_told_at_once(web_server, s3_of, bucket, words):
    server = web_server({})
    s3_of(server.url)
    url = f"s3://{bucket}/folder/a.jsonl"
    for name in ("write", "read", "list", "text", "copy", "settings"):
        server.asked = 0
        line = line_of(CALLS[name], url)
        # An answer to HEAD has no body, so it may tell less.
        assert re.search(f"{words}|access was denied|was refused .400.", line)
        assert server.asked <= 7
    for call in (CALLS["write"], file_sizes):
        assert re.search(words, line_of(call, url))


def test_credentials_that_are_not_there(web_server, s3_of, at_once):
    server = web_server({})
    unset = {
        "AWS_ACCESS_KEY_ID": None,
        "AWS_SECRET_ACCESS_KEY": None,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    for environment, words in (
        (unset, "no credentials were found; set AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": None}, "half of the credentials is missing"),
        ({"AWS_PROFILE": "nobody"}, "profile (nobody) could not be found; correct AWS_PROFILE"),
    ):
        s3_of(server.url, **environment)
        for call in CALLS.values():
            with at_once():
                assert words in line_of(call, "s3://bucket/a.jsonl")
    assert server.asked == 0


def test_an_endpoint_that_is_not_there(s3_of, impatient):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for endpoint, words in (
        (f"http://127.0.0.1:{port}", "nothing answers: Could not connect to the endpoint URL"),
        (
            "http://no-such-host.invalid",
            "there is no host no-such-host.invalid; correct the URL (for S3: AWS_ENDPOINT_URL)",
        ),
    ):
        s3_of(endpoint)
        for name in ("read", "write"):
            assert words in line_of(CALLS[name], "s3://bucket/a.jsonl")
    assert "Invalid bucket name" in line_of(read_bytes, "s3://Bad_Name!/a.jsonl")


# --- Disks --------------------------------------------------------------------------------------------------------------


def test_places_on_disk_that_are_something_else(tmp_path):
    (tmp_path / "file.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "folder.jsonl").mkdir()
    below = f"{tmp_path}/file.jsonl/a.jsonl"
    for call in (read_bytes, read_text, copy, CALLS["write"], CALLS["settings"], CALLS["list"]):
        assert re.search("a file (stands where its folder should be|is in the way)", line_of(call, below))
    folder = f"{tmp_path}/folder.jsonl"
    for call in (read_bytes, read_text, sha256, CALLS["settings"], CALLS["write"]):
        assert "that is a folder; give a file" in line_of(call, folder)
    assert "/proc/none/file: nothing can be written there" in line_of(CALLS["write"], "/proc/none/file")
    assert "the name is too long" in line_of(CALLS["write"], f"{tmp_path}/{'x' * 300}")
    os.symlink(tmp_path / "b", tmp_path / "a")
    os.symlink(tmp_path / "a", tmp_path / "b")
    assert "circle" in line_of(read_bytes, f"{tmp_path}/a")


AS_NOBODY = """
import os, sys
from llada.errors import UserError
from llada.files import local_path, read_bytes, write_bytes
local_path("/")
os.setuid(65534)
for call in (lambda: read_bytes(sys.argv[1] + "/secret"), lambda: write_bytes(sys.argv[1] + "/new/file", b"x")):
    try:
        call()
    except UserError as error:
        print(error)
"""


def shown(*command: str) -> list[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which root alone can")
def test_places_on_disk_without_permission():
    folder = "/tmp/llada-permission-test"  # pytest's own folders are closed to others
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    try:
        with open(f"{folder}/secret", "w") as secret:
            secret.write("x")
        os.chmod(f"{folder}/secret", 0)
        os.chmod(folder, 0o755)
        lines = shown(sys.executable, "-c", AS_NOBODY, folder)
    finally:
        shutil.rmtree(folder)
    assert len(lines) == 2
    assert lines[0] == f"{folder}/secret: no permission; change the rights, or give another place"
    assert lines[1].startswith(f"{folder}/new/file: no permission")


ON_SMALL_DISKS = """
import os, subprocess, sys
from llada.errors import UserError
from llada.files import write_bytes
os.makedirs(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", sys.argv[1]], check=True)
def attempt():
    try:
        write_bytes(sys.argv[1] + "/file", bytes(4 << 20))
    except UserError as error:
        print(error, "|", os.listdir(sys.argv[1]))
attempt()
subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
attempt()
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounts a disk, which root alone can"
)
def test_disks_that_are_full_or_read_only(tmp_path):
    allowed = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False, capture_output=True
    )
    if allowed.returncode:
        pytest.skip("no disk can be mounted here")
    disk = f"{tmp_path}/disk"
    full, read_only = shown("unshare", "-m", sys.executable, "-c", ON_SMALL_DISKS, disk)
    assert (
        full
        == f"no space left while writing {disk}/file: free some and run the same command again; what is finished is kept | []"
    )
    assert read_only == f"{disk}/file: the disk is read-only; give another place | []"


# --- Which errors are told ----------------------------------------------------------------------------------------------


def test_faults_of_ours_and_files_that_are_not_there_stay_what_they_are():
    for error in (
        KeyError("k"),
        ValueError("shape"),
        NotImplementedError(),
        ConnectionError("of Ray"),
        RuntimeError("x"),
        OSError("plain"),
    ):
        assert told(error, "s3://x") is None
    assert told(FileNotFoundError(errno.ENOENT, "none"), "x") is None
    with pytest.raises(FileNotFoundError), storage_errors("x"):
        raise FileNotFoundError("x")
    with pytest.raises(UserError, match="^row 3$"), storage_errors("x"):
        raise UserError("row 3")


def test_a_told_error_is_told_once_and_remembers_whether_it_may_pass():
    busy, denied = (
        told(OSError(number, os.strerror(number)), "s3://x") for number in (errno.EIO, errno.EACCES)
    )
    assert may_pass(busy)
    assert not may_pass(denied)
    assert is_store_error(busy)
    assert told(busy, "other") is busy
    assert may_pass(TimeoutError("slow"))
    assert not may_pass(FileNotFoundError())
    assert reason(OSError("it is gone")) == "it is gone"
    assert reason(PermissionError(errno.EACCES, "Permission denied")) == "no permission"
