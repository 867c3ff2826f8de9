"""The command `submit`: a stage as a job of a Ray cluster.

    llada submit prepare llada_8b --input s3://… --output s3://… --cluster ray_configs/cpu_cluster.yaml
    llada submit --address https://ray.example.org pretrain llada_8b …       what stands before the stage is ours
    llada submit list            llada submit follow JOB            llada submit stop JOB

The stage's words are read here first, as the stage itself reads them, and its cluster file is; only what would begin is
sent. The code travels, with the files that the words name, and `runtime_env` of the cluster file is the environment of
the job and of its tasks. The log comes back, and the exit code is the job's. Ctrl-C leaves the job running: the same
command follows it, and once it has ended, however, goes on with what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llada.errors import UserError, hint
from llada.files import local_path
from llada.settings import check_limits, limited, require
from pipelines.manifests.serve_config import find_environment_mistakes
from pipelines.stage.artifact import git_commit
from pipelines.stage.cluster import ClusterConfig, load_cluster
from pipelines.stage.command import Common, parse, parse_stage, run_command
from pipelines.stage.job_log import JobLog
from pipelines.stage.job_server import code_environment, job_server, server_address

STAGES = ("prepare", "pretrain", "sft", "evaluate", "generate", "train-classifier")
ACTIONS = ("list", "follow", "stop")
# Files that a command names are settings; data is on a store.
MAX_FILES_BYTES = 10 << 20
# A log is a file on the head's disk: a progress bar writes its state so seldom.
_BAR_EVERY_S = "1"
_POLL_S = 1.0
_AGENT_TIMEOUT_S = 120.0
_STOPPED = 143


@dataclass(frozen=True)
class SubmitArgs:
    """Run a stage as a job of a Ray cluster: llada submit [these options] <stage> …, with a cluster file of `address: auto`. Or
    list, follow JOB, stop JOB. The token is Ray's: $RAY_AUTH_TOKEN, $RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""

    address: str | None = None
    """The job server's, http://host:8265 or https://…; default $RAY_API_SERVER_ADDRESS, else this machine's."""
    code: str = "here"
    """"here" sends the packages of this installation, "image" nothing, because the nodes have them; or a wheel."""
    wait: bool = True
    """Show the log until the job ends, and end with its exit code."""
    driver_cpus: float | None = limited(None, low=0)
    """CPUs set aside for the job's own process, which has no model and no data. Without any of these it runs on the head."""
    driver_gpus: float | None = limited(None, low=0)
    driver_memory_bytes: int | None = limited(None, low=1)
    driver_resources: dict[str, float] = field(default_factory=dict)
    """Custom resources of a node for it, such as `--driver-resources stable 1`."""

    def __post_init__(self) -> None:
        check_limits(self, "submit")


@dataclass(frozen=True)
class Job:
    """A stage, ready to be sent."""

    stage: str
    entrypoint: str
    output: str
    cluster: ClusterConfig
    files: tuple[str, ...]
    """Relative paths that the words name; they travel."""
    metadata: dict[str, str]


def main(argv: Sequence[str]) -> None:
    """`llada submit …`"""
    first = next((i for i, word in enumerate(argv) if word in (*STAGES, *ACTIONS)), len(argv))
    args = parse(SubmitArgs, argv[:first], f"submit [these] <{'|'.join((*STAGES, *ACTIONS))}>")
    require(
        first < len(argv),
        f"name a stage ({', '.join(STAGES)}), or list, follow or stop: llada submit [options] <stage> …",
    )
    what, words = argv[first], list(argv[first + 1 :])
    address = server_address(args.address)
    if what in STAGES:
        job = read_job(what, words)
        with job_server(address) as client:
            _run(client, job, args, address)
        return
    require(what != "list" or not words, "list takes no words")
    require(
        what == "list" or len(words) == 1,
        f"name the job: llada submit {what} JOB (llada submit list tells them)",
    )
    with job_server(address) as client:
        if what == "list":
            print(list_jobs(client))
            return
        (name,) = words
        find_job(client, name)
        if what == "stop":
            stopped = client.stop_job(name)
            print(f"job {name} " + ("is being stopped" if stopped else "had ended before"))
        else:
            follow(client, name)


def _run(client: Any, job: Job, args: SubmitArgs, address: str) -> None:
    name = find_running(client, job)
    if name is None:
        name = send(client, job, args)
        print(f"job {name}: {address}", file=sys.stderr)
    else:
        print(f"job {name} is this command already", file=sys.stderr)
    if args.wait:
        follow(client, name)


# --- What is sent -----------------------------------------------------------------------------------------------------


def read_job(stage: str, words: Sequence[str]) -> Job:
    """The stage that these words ask for, read as it reads them itself. Raises UserError for what could not run as a job."""
    require(not {"-h", "--help"} & set(words), f"the words of {stage} are told by: llada {stage} --help")
    try:
        args = parse_stage(stage, words)
    except UserError as error:
        raise UserError(f"{stage}: {error}") from error
    common: Common | None = getattr(args, "common", None)
    output = common.output if common else args.output
    require(
        "://" in output or os.path.isabs(output),
        f"--output {output} would be a folder of the job, which is deleted with it: give a URL, or the absolute path of a "
        "disk that all nodes have",
    )
    cluster = ClusterConfig(address="auto") if common is None else load_cluster(common.cluster)
    require(
        cluster.address is not None,
        "without a --cluster file of `address: auto` the stage would start a Ray of its own within the job (ray_configs/)",
    )
    if mistakes := find_environment_mistakes(cluster.runtime_env, "runtime_env"):
        raise UserError(f"{common.cluster if common else ''}: {mistakes[0]}")
    if common and common.tracking_uri is None and local_path(output) is None:
        has_uri = "MLFLOW_TRACKING_URI" in {**os.environ, **cluster.runtime_env.get("env_vars", {})}
        if not has_uri:
            print(
                "no --tracking-uri and no $MLFLOW_TRACKING_URI: the MLflow run is deleted with the job",
                file=sys.stderr,
            )
    preset = words[0] if words and not words[0].startswith("-") else ""
    # The MLflow run is made by the job, and bears its name (the tag `ray_job`); here stands where to look for it.
    tracking = (common.tracking_uri if common else None) or os.environ.get("MLFLOW_TRACKING_URI", "")
    metadata = {
        "stage": stage,
        "preset": preset,
        "output": output,
        "commit": git_commit() or "",
        "mlflow": tracking,
    }
    with contextlib.suppress(Exception):  # no such user in a container
        metadata["user"] = getpass.getuser()
    module = stage.replace("-", "_")
    return Job(
        stage=stage,
        entrypoint=shlex.join(["python", "-m", f"pipelines.{module}", *words]),
        output=output,
        cluster=cluster,
        files=named_files(words),
        metadata={name: value for name, value in metadata.items() if value},
    )


def named_files(words: Sequence[str]) -> tuple[str, ...]:
    """The relative paths among the words at which there is a file here. Raises UserError for folders and for data."""
    found: dict[str, int] = {}
    for word in words:
        path = word.partition("=")[2] if word.startswith("--") else word
        path = path.removeprefix("@")
        if not path or os.path.isabs(path) or not os.path.exists(path):
            continue
        require(
            ".." not in Path(path).parts,
            f"{path} is not below this folder, from which the job's files come: give it from the folder above",
        )
        require(
            not os.path.isdir(path),
            f"{path} is a folder of this machine, which the job would not find: give a URL, or the absolute path of a disk "
            "that all nodes have",
        )
        found[path] = os.path.getsize(path)
    if sum(found.values()) > MAX_FILES_BYTES:
        largest = max(found, key=lambda path: found[path])
        raise UserError(
            f"{largest} has {found[largest]:,} bytes, and what travels with a job is {MAX_FILES_BYTES:,} at the most: put "
            "data on a store that all nodes reach"
        )
    return tuple(found)


@contextlib.contextmanager
def job_environment(job: Job, code: str) -> Iterator[dict[str, Any]]:
    """The job's runtime environment, for a `with` block in which what it names is on this machine's disk."""
    with (
        code_environment(code, job.cluster.runtime_env) as environment,
        tempfile.TemporaryDirectory() as folder,
    ):
        env_vars = {"TQDM_MININTERVAL": _BAR_EVERY_S}
        if (uri := os.environ.get("MLFLOW_TRACKING_URI", "")).startswith("http"):
            env_vars["MLFLOW_TRACKING_URI"] = uri
        environment["env_vars"] = {**env_vars, **environment["env_vars"]}
        if job.files and "working_dir" not in environment:
            require(
                "image_uri" not in environment,
                f"a job with runtime_env.image_uri takes no files along ({job.files[0]}): name them by absolute paths in the "
                "image",
            )
            for path in job.files:
                Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, Path(folder, path))
            environment["working_dir"] = folder
        yield environment


def send(client: Any, job: Job, args: SubmitArgs) -> str:
    """Submit the job; its name."""
    name = f"{job.stage}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    with job_environment(job, args.code) as environment:
        deadline = time.monotonic() + _AGENT_TIMEOUT_S
        while True:
            try:
                return client.submit_job(
                    entrypoint=job.entrypoint,
                    submission_id=name,
                    runtime_env=environment,
                    metadata=dict(job.metadata),
                    entrypoint_num_cpus=args.driver_cpus,
                    entrypoint_num_gpus=args.driver_gpus,
                    entrypoint_memory=args.driver_memory_bytes,
                    entrypoint_resources=args.driver_resources or None,
                )
            except RuntimeError as error:
                # What a cluster says that has only just started.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)


# --- Jobs that are there ----------------------------------------------------------------------------------------------


def find_running(client: Any, job: Job) -> str | None:
    """The job that is this one, if it has not ended. Raises UserError where another one is at work on the same output."""
    for there in client.list_jobs():
        if there.status.is_terminal() or (there.metadata or {}).get("output") != job.output:
            continue
        if there.entrypoint == job.entrypoint:
            return there.submission_id
        raise UserError(
            f"{job.output}: job {there.submission_id} is at work on it ({there.entrypoint}); wait for it, or "
            f"llada submit stop {there.submission_id}"
        )
    return None


def find_job(client: Any, name: str) -> Any:
    """Ray's JobDetails. Raises UserError when there is none of this name."""
    jobs = {job.submission_id: job for job in client.list_jobs() if job.submission_id}
    if name not in jobs:
        raise UserError(f"no job {name!r}; {hint(name, jobs)}" if jobs else f"no job {name!r}, nor any other")
    return jobs[name]


def list_jobs(client: Any) -> str:
    """A table of the cluster's jobs, the newest first."""
    jobs = [job for job in client.list_jobs() if job.submission_id]
    rows = [("job", "status", "since", "minutes", "preset", "output")]
    for job in sorted(jobs, key=lambda job: job.start_time or 0, reverse=True):
        told, start = job.metadata or {}, (job.start_time or 0) / 1000
        end = job.end_time / 1000 if job.end_time else time.time()
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(start))
        rows.append(
            (
                job.submission_id,
                job.status.value,
                since,
                f"{(end - start) / 60:.1f}",
                told.get("preset", ""),
                told.get("output", job.entrypoint),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def follow(client: Any, name: str) -> None:
    """Show the job's log from its beginning to its end. Raises SystemExit with its exit code unless that is 0."""
    log = JobLog()
    try:
        asyncio.run(_show(client, name, log))
        info = client.get_job_info(name)
        while not info.status.is_terminal():
            time.sleep(_POLL_S)
            info = client.get_job_info(name)
    except KeyboardInterrupt:
        _write(log.close())
        print(f"job {name} goes on: llada submit follow {name}, or stop {name}", file=sys.stderr)
        raise
    _write(log.close())
    if info.status == "SUCCEEDED":
        return
    if info.status == "STOPPED":
        print(f"job {name} was stopped", file=sys.stderr)
        raise SystemExit(_STOPPED)
    if (code := info.driver_exit_code) is None:  # it has not come to its own words
        raise UserError(f"job {name} did not start: {' '.join((info.message or 'no reason given').split())}")
    print(f"job {name} failed with exit code {code}", file=sys.stderr)
    raise SystemExit(code if code > 0 else 128 - code)


async def _show(client: Any, name: str, log: JobLog) -> None:
    """Write the log as it comes; where the connection breaks, again from where it was."""
    import aiohttp

    seen = 0
    while True:
        place = 0
        try:
            async for piece in client.tail_job_logs(name):
                new = piece[max(seen - place, 0) :]
                place += len(piece)
                seen = max(seen, place)
                _write(log.read(new))
            return
        except (RuntimeError, OSError, aiohttp.ClientError):
            if client.get_job_info(name).status.is_terminal():
                return
            await asyncio.sleep(_POLL_S)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    run_command("submit")
