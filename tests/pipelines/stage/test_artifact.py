import dataclasses
import errno
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from llada.errors import UserError
from llada.files import exists, read_bytes, storage_errors
from llada.tokenizer import save_tokenizer, train_tokenizer
from pipelines.stage.artifact import (
    Output,
    fetch_folder,
    folder_id,
    given_back_if_refused,
    open_output,
    put_folder,
    read_manifest,
    require_same_tokenizer,
)

INPUTS = [{"url": "/data/a", "id": "1"}, {"url": "/data/b", "id": "2"}]


@dataclasses.dataclass(frozen=True)
class Inner:
    lr: float = 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 10
    optim: Inner = Inner()
    betas: tuple[float, ...] = (0.9, 0.95)


@pytest.fixture(params=["local", "memory"])
def url(request, tmp_path):
    yield str(tmp_path / "out") if request.param == "local" else "memory://artifact-test"
    fsspec.filesystem("memory").store.clear()


def open_it(url, **changes):
    settings = {"stage": "train", "config": Config(), "inputs": INPUTS} | changes
    return open_output(url, **settings | {"config": dataclasses.asdict(settings["config"])})


def test_open_finish_skip(url):
    output = open_it(url)
    assert not output.is_complete
    with pytest.raises(UserError, match="not complete: run the stage 'train' again"):
        read_manifest(url)
    assert not open_it(url).is_complete  # a crash: the same work may go on
    manifest = output.finish({"rows": 3}, kind="checkpoint", extra={"x": 1})
    again = open_it(url, inputs=[{"url": "/moved/a", "id": "1"}, INPUTS[1]])
    assert again.is_complete
    assert again.manifest == manifest == read_manifest(url)
    assert manifest["counts"] == {"rows": 3}
    assert manifest["extra"] == {"x": 1}
    assert manifest["config"]["betas"] == [0.9, 0.95]
    assert manifest["versions"]["numpy"]


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "sft"}, "the output of stage 'train', not 'sft'"),
        ({"config": Config(steps=20)}, r"made with steps 10 \(now 20\); choose another --output"),
        ({"config": Config(optim=Inner(0.2))}, r"optim\.lr 0\.1 \(now 0\.2\)"),
        ({"inputs": [INPUTS[0], {"url": "/data/b", "id": "3"}]}, r"other inputs \(/data/b changed\)"),
        ({"inputs": INPUTS[::-1]}, "another order"),
        ({"inputs": INPUTS[:1]}, r"/data/b changed"),
    ],
)
def test_a_folder_of_other_work_is_never_written_over(tmp_path, finished, changes, message):
    url = str(tmp_path / "out")
    output = open_it(url)
    if finished:
        output.finish({}, kind="checkpoint")
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match=message):
        open_it(url, **changes)
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}


def refused_in(url, *, writes=(), **changes):
    """A stage that begins a folder, writes, and is refused."""
    with pytest.raises(UserError), given_back_if_refused(url):
        open_it(url, **changes)
        for name in writes:
            put(url, name)
        raise UserError("give fewer steps")


def put(url, name, data=b"{}"):
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(os.path.dirname(f"{root}/{name}"), exist_ok=True)
    fs.pipe_file(f"{root}/{name}", data)


def test_a_folder_in_which_nothing_was_made_before_a_refusal_takes_the_remedy(url):
    # MLflow was away: what it has not been told stays for `llada track`.
    refused_in(url, writes=("tracking.json", "logs/ray.log", "tracking-undelivered.jsonl"))
    refused_in(url, config=Config(steps=5))
    assert open_it(url, config=Config(steps=2)).config["steps"] == 2
    assert exists(f"{url}/tracking-undelivered.jsonl")


def test_a_folder_in_which_something_was_made_stays_its_works(url):
    refused_in(url, writes=("rows/0.json",))
    with pytest.raises(UserError, match="already holds other work: made with steps 10"):
        open_it(url, config=Config(steps=5))
    open_it(url)


def test_the_refusal_of_another_stage_takes_no_folder_from_the_one_at_work(url):
    open_it(url)
    refused_in(url)  # the same command a second time
    refused_in(url, config=Config(steps=5))
    with pytest.raises(UserError, match="already holds other work"), given_back_if_refused(f"{url}/new"):
        # Both have found nothing, and the other was quicker.
        open_it(f"{url}/new")
        open_it(f"{url}/new", config=Config(steps=5))
    with pytest.raises(UserError, match="fewer"), given_back_if_refused(f"{url}/newer"):
        # While this one went through its inputs, another process has begun the same work.
        put(f"{url}/newer", "stage.json", read_bytes(f"{url}/stage.json"))
        open_it(f"{url}/newer")
        raise UserError("give fewer steps")
    assert exists(f"{url}/newer/stage.json")
    for folder in (url, f"{url}/new"):
        with pytest.raises(UserError, match="already holds other work"):
            open_it(folder, config=Config(steps=5))


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"not empty \(holiday\.jpg"):
        open_it(str(tmp_path))


def test_a_lost_file_makes_a_folder_incomplete(tmp_path):
    (tmp_path / "out").mkdir()
    output = open_it(str(tmp_path / "out"))
    (tmp_path / "out/a.bin").write_bytes(b"12345")
    output.finish({}, kind="checkpoint", files={"a.bin": {"bytes": 5, "sha256": "..."}})
    assert open_it(str(tmp_path / "out")).is_complete
    (tmp_path / "out/a.bin").write_bytes(b"123")
    assert not open_it(str(tmp_path / "out")).is_complete


def test_a_broken_manifest_is_named(tmp_path):
    open_it(str(tmp_path / "out"))
    (tmp_path / "out/manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is not JSON"):
        read_manifest(str(tmp_path / "out"))
    (tmp_path / "out/manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"manifest\.json holds no settings"):
        read_manifest(str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"no manifest\.json at .*nowhere"):
        read_manifest(str(tmp_path / "nowhere"))


def test_put_and_fetch_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LLADA_CACHE", str(tmp_path / "cache"))
    for name in ("manifest.json", "deep/a.bin"):
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_text(name)
    remote = "memory://bucket/folder"
    put_folder(tmp_path / "local", remote)
    copy = fetch_folder(remote)
    assert {str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file()} == {
        "manifest.json",
        "deep/a.bin",
    }
    assert fetch_folder(remote) == copy  # from the cache
    fsspec.filesystem("memory").pipe_file("/bucket/folder/deep/a.bin", b"changed!")
    assert (fetch_folder(remote) / "deep/a.bin").read_text() == "changed!"
    put_folder(tmp_path / "local", str(tmp_path / "copy"))
    assert fetch_folder(str(tmp_path / "copy")) == tmp_path / "copy"
    for missing in ("memory://bucket/none", str(tmp_path / "none")):
        with pytest.raises(UserError, match="no folder at"):
            fetch_folder(missing)


def test_processes_that_want_the_same_folder_fetch_it_once(tmp_path, monkeypatch):
    """Threads stand for them: each opens the lock's file for itself."""
    monkeypatch.setenv("LLADA_CACHE", str(tmp_path / "cache"))
    fs, remote = fsspec.filesystem("memory"), f"memory://{tmp_path.name}/folder"
    fs.pipe_file(f"{remote}/a.bin", b"a" * 1000)
    fetched, get = [], type(fs).get

    def slow_get(self, *paths, **options):
        fetched.append(paths)
        time.sleep(0.2)
        return get(self, *paths, **options)

    monkeypatch.setattr(type(fs), "get", slow_get)
    with ThreadPoolExecutor(4) as pool:
        (copy,) = set(pool.map(fetch_folder, [remote] * 4))
    assert (copy / "a.bin").read_bytes() == b"a" * 1000
    assert len(fetched) == 1


def test_a_fetch_that_fails_leaves_nothing_and_may_be_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LLADA_CACHE", str(tmp_path / "cache"))
    fs, remote = fsspec.filesystem("memory"), f"memory://{tmp_path.name}/folder"
    fs.pipe_file(f"{remote}/a.bin", b"a")
    with monkeypatch.context() as broken:
        broken.setattr(type(fs), "get", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fetch_folder(remote)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert (fetch_folder(remote) / "a.bin").read_bytes() == b"a"


def test_a_folder_without_a_manifest_is_known_by_its_content(tmp_path):
    """An official checkpoint: another one with files of the same names and sizes is another input."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    os.utime(file, (1, 1))
    one = folder_id(str(tmp_path))
    assert folder_id(str(tmp_path)) == one
    file.write_bytes(b"two")
    assert folder_id(str(tmp_path)) != one


def test_only_named_settings_may_change_and_only_before_the_end(tmp_path):
    def reopen(lr: float, **kwargs: object) -> Output:
        config = {"optim": {"lr": lr, "warmup": 3}}
        return open_output(str(tmp_path / "out"), stage="pretrain", config=config, inputs=[], **kwargs)

    reopen(1.0)
    with pytest.raises(UserError, match=r"optim\.lr 1\.0 \(now 2\.0\)"):
        reopen(2.0)
    assert reopen(2.0, may_change=("optim.lr",)).finish({}, kind="x")["config"]["optim"]["lr"] == 2.0
    with pytest.raises(UserError, match=r"optim\.lr 2\.0 \(now 3\.0\)"):
        reopen(3.0, may_change=("optim.lr",))


def test_what_a_stage_goes_on_with_is_recorded_from_which_step_on(tmp_path):
    def reopen(done: int, lr: float, rows: int, **kwargs: object) -> Output:
        config = {"optim": {"lr": lr}, "train": {"rows": rows, "new": 1}}
        allowed = {"may_change": ("optim.lr", "train.rows"), "defaults": {"train.new": 1}}
        return open_output(
            str(tmp_path), stage="pretrain", config=config, inputs=[], done=done, **allowed, **kwargs
        )

    older = {"optim": {"lr": 1.0}, "train": {"rows": 8}}
    assert open_output(str(tmp_path), stage="pretrain", config=older, inputs=[]).history == []
    assert reopen(0, 1.0, 8).history == []
    assert len(reopen(500, 0.5, 4).history) == 1
    assert len(reopen(700, 0.5, 4).history) == 1  # nothing new
    folder = reopen(900, 0.5, 2)
    steps = [(change["step"], change["changed"]) for change in folder.history]
    assert steps == [(500, {"optim.lr": [1.0, 0.5], "train.rows": [8, 4]}), (900, {"train.rows": [4, 2]})]
    begun = json.loads((tmp_path / "stage.json").read_text())
    assert begun["config"] == folder.config
    assert [change["step"] for change in begun["history"]] == [500, 900]
    manifest = folder.finish({}, kind="checkpoint")
    assert [change["step"] for change in manifest["history"]] == [500, 900]
    finished = reopen(1000, 0.5, 2)
    assert finished.is_complete
    # A finished one that is extended goes on with the same record.
    again = reopen(1000, 0.25, 2, extend=True)
    assert not again.is_complete
    assert [change["step"] for change in again.history] == [500, 900, 1000]
    assert len(reopen(1100, 0.25, 2, extend=True).history) == 3


@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_goes_on_under_a_settings_new_name(tmp_path, finished):
    """What an earlier version called objective.objective is objective.kind; another value is other work all the same."""

    def reopen(objective: dict[str, str]) -> Output:
        return open_output(str(tmp_path), stage="pretrain", config={"objective": objective}, inputs=[])

    output = reopen({"objective": "masked_diffusion", "schedule": "llada"})
    if finished:
        output.finish({}, kind="checkpoint")
    assert reopen({"kind": "masked_diffusion", "schedule": "llada"}).is_complete == finished
    with pytest.raises(UserError, match=r"objective\.kind 'masked_diffusion' \(now 'autoregressive'\)"):
        reopen({"kind": "autoregressive", "schedule": "llada"})


def test_a_setting_that_an_older_folder_does_not_know_is_its_default(tmp_path):
    url, old = str(tmp_path), {"optim": {"lr": 0.1}}
    open_output(url, stage="train", config=old, inputs=[])
    defaults = {"optim.decay": ("linear",), "train.other": 1}
    new = {"optim": {"lr": 0.1, "decay": ("linear",)}}
    assert not open_output(url, stage="train", config=new, inputs=[], defaults=defaults).is_complete
    new["optim"]["decay"] = ("cosine",)
    with pytest.raises(UserError, match=r"made with optim\.decay \['linear'\] \(now \['cosine'\]\);"):
        open_output(url, stage="train", config=new, inputs=[], defaults=defaults)


def test_a_tokenizer_with_other_ids_is_refused(tmp_path):
    texts = ["the quick brown fox jumps over the lazy dog " * 3]
    save_tokenizer(train_tokenizer(texts, 270), tmp_path / "model")
    save_tokenizer(train_tokenizer(texts, 270), tmp_path / "same" / "tokenizer")
    save_tokenizer(train_tokenizer(["zebras quiz jumpily " * 9], 270), tmp_path / "other" / "tokenizer")
    require_same_tokenizer(str(tmp_path / "model"), str(tmp_path / "same"))
    require_same_tokenizer(str(tmp_path), str(tmp_path / "other"))  # a checkpoint without a tokenizer
    with pytest.raises(UserError, match="was not tokenised with the tokenizer of .*differ, such as"):
        require_same_tokenizer(str(tmp_path / "model"), str(tmp_path / "other"))


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out/manifest\.json: a file stands where its folder should be"):
        open_it(str(tmp_path / "file" / "out"))


def test_a_full_disk_is_one_clear_error():
    with (
        pytest.raises(UserError, match="no space left while writing s3://x: free some"),
        storage_errors("s3://x"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    wrapped = RuntimeError("writing failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "full")
    with pytest.raises(UserError, match="no space left"), storage_errors("x"):
        raise wrapped
    with pytest.raises(KeyError), storage_errors("x"):
        raise KeyError("something else stays what it is")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device():
    with pytest.raises(UserError, match="no space left"), storage_errors("/dev/full"):
        Path("/dev/full").write_text("x")
