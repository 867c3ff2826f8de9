"""What Ray adds to a training: CPU time of a step, and of a run before its first step.

    python tests/benchmarks/ray_overhead.py [--turns N] [--steps N] [--starts N] [--width D] [--layers N] [--rows N]
                                            [--row-length N] [--results FOLDER] [--quick]

plain   `llada.training.trainer.train` in a process
ray     what the command `pretrain` does with the same run: the worker's function on one worker of a Ray started for it, which
        keeps the record of the run (metrics) and tells the driver of it

A step, in two ways. Both train at once, in turns of some steps; who has no turn waits, so what else the machine does meets both
alike.

counted    what all processes of the Ray run, that of the worker too, take while they wait for the other's turn: nothing of it is
           the step's, and it goes on with the time, not with the steps. As a part of one core, and of a step.
compared   the process that trains with the plain one, turn by turn, and to it what all others take in the turn. This has in it
           what the worker does for Ray in a step, and also the noise of the steps, which is several times what is looked for.

A step here is one of one thread: to one that keeps more cores busy, the same is a smaller part.

The start: CPU time of all processes of a run from their beginning until its first step, and the wall time, over several starts.

Six minutes on a quiet machine. Writes ray_overhead.json. --quick takes a tiny network, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil

# Of the contestants' own imports each brings what it needs, and pays for it.

HERE = Path(__file__).resolve().parent
CONTESTANTS = ("plain", "ray")
# A Ray on a busy machine may take so long to start.
PATIENCE_S = 300.0
NEVER = 1 << 30


@dataclass(frozen=True)
class Setting:
    """What both train."""

    width: int
    layers: int
    rows: int
    """Of a step, which is one micro-batch."""
    row_length: int
    steps: int
    """Of a turn, logged at its end."""
    vocabulary: int = 4096

    def run(self, turns: int) -> tuple[Any, Any]:
        """The network and the run: a turn to get warm, then `turns`."""
        from llada.diffusion.objective import ObjectiveConfig
        from llada.model.transformer import ModelConfig
        from llada.training.optim import OptimConfig
        from llada.training.run import RunConfig, TrainConfig

        model = ModelConfig(
            vocab_size=self.vocabulary,
            d_model=self.width,
            num_layers=self.layers,
            num_heads=self.width // 64,
            ffn_dim=self.width * 11 // 4,
            max_length=self.row_length,
            mask_token_id=1,
            eos_token_id=0,
            pad_token_id=0,
        )
        config = TrainConfig(
            num_steps=(1 + turns) * self.steps,
            global_batch_tokens=self.rows * self.row_length,
            micro_batch_rows=self.rows,
            precision="fp32",
            log_every=self.steps,
            validate_every=NEVER,
            validation_rows=self.rows,
            checkpoint_every=NEVER,
        )
        return model, RunConfig(ObjectiveConfig(document_mask=False), OptimConfig(warmup_steps=0), config)


def write_folder(folder: Path, setting: Setting) -> None:
    """A prepared folder of random tokens, the validation rows among those that are trained on."""
    import numpy as np
    from training import write_data

    from llada.data.tokens.shards import write_unigram_counts

    model, _ = setting.run(0)
    write_data(folder, model, 64 * setting.rows, setting.row_length)
    manifest = json.loads((folder / "manifest.json").read_text())
    splits = manifest["dataset"]["splits"]
    splits["validation"] = splits["train"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_unigram_counts(str(folder), np.ones(setting.vocabulary, dtype=np.int64))


# --- In the process that trains ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Used:
    """What a run has used: seconds on the clock, and of CPU in the process that trains and in each of the others by its name."""

    seconds: float
    worker: float
    others: dict[str, float]

    @property
    def in_others(self) -> float:
        return sum(self.others.values())

    def since(self, before: Used) -> Used:
        others = {name: max(0.0, now - before.others.get(name, 0.0)) for name, now in self.others.items()}
        return Used(self.seconds - before.seconds, self.worker - before.worker, others)


@dataclass(frozen=True)
class Job:
    """One run of a contestant."""

    contestant: str
    setting: Setting
    turns: int
    folder: str
    output: str
    port: int
    """Where it says what it has used, and is told to go on."""


class Gate:
    """Hears the events of a run: behind the start and behind each turn, it says what was used there, and in the wait before, and
    waits to be told to go on."""

    def __init__(self, port: int, root: psutil.Process) -> None:
        self.root = root
        self.lines = socket.create_connection(("127.0.0.1", port)).makefile("rw")
        self.before = self.waited = Used(0.0, 0.0, {})

    def __call__(self, event: Any) -> None:
        if event.name not in ("start", "step"):
            return
        # What it takes to look at the other processes is in no turn, and in no wait.
        used = used_by_others(self.root, time.process_time()).since(self.before)
        self.lines.write(json.dumps({"turn": asdict(used), "wait": asdict(self.waited)}) + "\n")
        self.lines.flush()
        rests = replace(used_by_others(self.root, 0.0), worker=time.process_time())
        self.lines.readline()
        self.waited = used_by_others(self.root, time.process_time()).since(rests)
        self.before = replace(used_by_others(self.root, 0.0), worker=time.process_time())


def used_by_others(root: psutil.Process, worker: float) -> Used:
    """Of the process `root` and those below it, this one (`worker`) apart."""
    others: dict[str, float] = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            times, words = process.cpu_times(), process.cmdline() or [process.name()]
        except psutil.Error:  # has ended meanwhile
            continue
        if process.pid == os.getpid():
            continue
        name = "driver" if process == root else _name_of(words)
        others[name] = others.get(name, 0.0) + times.user + times.system
    return Used(time.time() - root.create_time(), worker, others)


def _name_of(words: list[str]) -> str:
    """Of one of Ray's processes: its program, or the class of the actor that it has made of its title."""
    if words[0].startswith("ray::"):
        return words[0].removeprefix("ray::").split(".")[0]
    scripts = [word for word in words[1:] if word.endswith(".py")]
    return Path(scripts[0] if scripts else words[0]).name


def train_plainly(job: Job) -> None:
    from llada.data.tokens.shards import load_unigram_counts
    from llada.training.trainer import train

    model, config = job.setting.run(job.turns)
    gate = Gate(job.port, psutil.Process())
    counts = load_unigram_counts(job.folder)
    train(
        model, config, job.folder, checkpoints=f"{job.output}/checkpoints", unigram_counts=counts, report=gate
    )


def train_under_ray(job: Job) -> None:
    import pipelines.pretrain  # noqa: F401 — what the command imports
    from pipelines.runners.workers import run_workers
    from pipelines.stage.cluster import ClusterConfig, until_exit

    with until_exit():
        run_workers(
            partial(_work, job, os.getpid()),
            output=job.output,
            # Who waits for a turn does not hang.
            cluster=ClusterConfig(num_cpus=1, hang_timeout_s=2 * PATIENCE_S),
            tracker=None,
            label="pretrain",
            progress=False,
        )


def _work(job: Job, driver: int, hooks: Any) -> Any:
    from llada.sampling.config import SamplingConfig
    from pipelines.pretrain import pretrain_worker

    model, config = job.setting.run(job.turns)
    gate = Gate(job.port, psutil.Process(driver))

    def report(event: Any) -> None:
        hooks.report(event)
        gate(event)

    return pretrain_worker(
        model,
        config,
        job.folder,
        job.output,
        None,
        None,
        replace(hooks, report=report),
        sampling=SamplingConfig(),
    )


# --- In the process that compares -------------------------------------------------------------------------------------


@contextmanager
def running(server: socket.socket, job: Job) -> Iterator[Any]:
    """A contestant that has come to its first step; its lines. At the end of the block it has ended."""
    job_text = json.dumps(asdict(job))
    process = subprocess.Popen([sys.executable, __file__, "--job", job_text], stdout=subprocess.DEVNULL)
    try:
        connection, _ = server.accept()
        with connection, connection.makefile("rw") as lines:
            yield lines
            _go_on(lines)  # where it waits behind its last turn
            assert process.wait(PATIENCE_S) == 0, f"{job.contestant} has failed"
    finally:
        process.kill()


def _go_on(lines: Any) -> None:
    lines.write("\n")
    lines.flush()


Found = dict[str, list[dict[str, Used]]]
"""{"start", "turn" and "wait": [{contestant: what it used}]}, of each start, of each turn and of the wait before it."""


def _heard(lines: Any) -> dict[str, Used]:
    """What a contestant says of its turn and its wait."""
    return {kind: Used(**used) for kind, used in json.loads(lines.readline()).items()}


def measure(setting: Setting, turns: int, starts: int) -> Found:
    found: Found = {"start": [], "turn": [], "wait": []}
    with tempfile.TemporaryDirectory() as temporary, socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_S)
        folder = Path(temporary, "data")
        folder.mkdir()
        write_folder(folder, setting)

        def job(name: str, number: int, turns: int) -> Job:
            output = str(Path(temporary, f"{name}-{number}"))
            return Job(name, setting, turns, str(folder), output, server.getsockname()[1])

        for number in range(starts):
            found["start"].append({})
            for name in CONTESTANTS[:: 1 if number % 2 == 0 else -1]:
                with running(server, job(name, number, 0)) as lines:
                    found["start"][-1][name] = _heard(lines)["turn"]
                    _go_on(lines)
                    lines.readline()
        with (
            running(server, job("plain", starts, turns)) as plain,
            running(server, job("ray", starts, turns)) as ray,
        ):
            both = {"plain": plain, "ray": ray}
            for lines in both.values():  # the start and the turn to get warm
                lines.readline()
                _go_on(lines)
                lines.readline()
            for turn in range(turns):
                found["turn"].append({})
                found["wait"].append({})
                for name in CONTESTANTS[:: 1 if turn % 2 == 0 else -1]:
                    _go_on(both[name])
                    for kind, used in _heard(both[name]).items():
                        found[kind][-1][name] = used
    return found


def summary(found: Found, steps: int) -> dict[str, Any]:
    """Medians and ranges; of ratios, those of the turns. What is counted is that of all waits together: a process takes of one no
    more than some of the hundredths of a second that the kernel tells."""
    plain, ray = ([turn[name] for turn in found["turn"]] for name in CONTESTANTS)
    rests = [wait["ray"] for wait in found["wait"]]
    waited_s = sum(each.seconds for each in rests)
    counted = {"worker": sum(each.worker for each in rests) / waited_s}
    for name in sorted({name for each in rests for name in each.others}):
        counted[name] = sum(each.others.get(name, 0.0) for each in rests) / waited_s
    busy_cores = sum(each.worker for each in plain) / sum(each.seconds for each in plain)
    pairs = list(zip(plain, ray, strict=True))
    starts = {name: [start[name] for start in found["start"]] for name in CONTESTANTS}
    return {
        "counted": {
            "waited_s": waited_s,
            "cores_by_process": dict(sorted(counted.items(), key=lambda item: -item[1])),
            "cores": sum(counted.values()),
            "of_a_step": sum(counted.values()) / busy_cores,
        },
        "step": {
            "plain_cpu_s": _spread([each.worker / steps for each in plain]),
            "ray_worker_cpu_s": _spread([each.worker / steps for each in ray]),
            "ray_others_cpu_s": _spread([each.in_others / steps for each in ray]),
            "ray_others_cores": _spread([each.in_others / each.seconds for each in ray]),
            "ray_cores_by_process": _by_process([replace(each, others=_cores(each)) for each in ray]),
            "added_in_worker": _spread([b.worker / a.worker - 1 for a, b in pairs]),
            "added_in_all": _spread([(b.worker + b.in_others) / a.worker - 1 for a, b in pairs]),
        },
        "start": {
            name: {
                "cpu_s": _spread([each.worker + each.in_others for each in rows]),
                "worker_cpu_s": _spread([each.worker for each in rows]),
                "cpu_s_by_process": _by_process(rows),
                "seconds": _spread([each.seconds for each in rows]),
            }
            for name, rows in starts.items()
        },
    }


def _cores(used: Used) -> dict[str, float]:
    return {name: each / used.seconds for name, each in used.others.items()}


def _by_process(rows: list[Used]) -> dict[str, dict[str, float]]:
    """Of each process but the one that trains, most first."""
    names = {name for row in rows for name in row.others}
    spreads = {name: _spread([row.others.get(name, 0.0) for row in rows]) for name in names}
    return dict(sorted(spreads.items(), key=lambda item: -item[1]["median"]))


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row-length", type=int, default=256)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        words = json.loads(arguments.job)
        job = Job(**words | {"setting": Setting(**words["setting"])})
        {"plain": train_plainly, "ray": train_under_ray}[job.contestant](job)
        return
    if arguments.quick:
        arguments.turns, arguments.steps, arguments.starts = 2, 5, 1
        arguments.width, arguments.layers, arguments.rows, arguments.row_length = 64, 1, 2, 32
    import ray
    from sampling_model import machine

    setting = Setting(
        arguments.width, arguments.layers, arguments.rows, arguments.row_length, arguments.steps
    )
    report: dict[str, Any] = {
        "machine": machine() | {"ray": ray.__version__},
        "setting": asdict(setting) | {"turns": arguments.turns, "starts": arguments.starts},
    }
    found = measure(setting, arguments.turns, arguments.starts)
    report |= summary(found, setting.steps)
    report["measured"] = {
        kind: [{name: asdict(used) for name, used in row.items()} for row in rows]
        for kind, rows in found.items()
    }
    report["machine"]["load_after"] = os.getloadavg()[0]
    step, start, counted = report["step"], report["start"], report["counted"]
    print(f"a step, plain   {_told(step['plain_cpu_s'], 1e3)} ms of CPU")
    print(f"  under Ray     {_told(step['ray_worker_cpu_s'], 1e3)} ms in the worker")
    print(f"  compared      {_told(step['added_in_worker'], 100)} % more in the worker")
    print(f"                {_told(step['added_in_all'], 100)} % more with all other processes, which take")
    print(f"                {_told(step['ray_others_cores'], 100)} % of a core")
    print(
        f"  counted       {100 * counted['of_a_step']:8.2f} % of a step, {100 * counted['cores']:.2f} % of a core:"
    )
    for name, cores in counted["cores_by_process"].items():
        print(f"  {name:19} {100 * cores:8.2f} %")
    for name, used in start.items():
        print(f"the start, {name:5} {_told(used['cpu_s'], 1)} s of CPU in {_told(used['seconds'], 1)} s")
    print(f"  {'worker':19} {_told(start['ray']['worker_cpu_s'], 1)} s")
    for name, used in start["ray"]["cpu_s_by_process"].items():
        print(f"  {name:19} {_told(used, 1)} s")
    target = arguments.results / "ray_overhead.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {target}")


def _told(spread: dict[str, float], factor: float) -> str:
    median, least, most = (spread[name] * factor for name in ("median", "least", "most"))
    return f"{median:8.2f} ({least:.2f} to {most:.2f})"


if __name__ == "__main__":
    main()
