"""Training on Ray's workers when something goes wrong: killed processes, full disks, damaged data, faults of ours."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from llada import files
from llada.config import Recipe
from llada.errors import UserError
from llada.model.hf import load_state, read_config
from llada.model.transformer import ModelConfig, Transformer
from llada.settings import to_json
from llada.store_errors import StoreError
from llada.training.events import RunStarted, StepDone
from llada.training.preemption import Departure, PreemptedError
from llada.training.trainer import TrainResult
from pipelines.prepare import prepare
from pipelines.pretrain import pretrain
from pipelines.runners import failure_budget
from pipelines.runners.workers import TrainFunction, WorkerHooks, run_workers
from pipelines.stage.cluster import ClusterConfig
from pipelines.stage.interruption import interruptible
from pipelines.stage.training import read_metrics

REPOSITORY = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.integration


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_state(folder, *read_config(folder))


def longer(recipe: Recipe) -> Recipe:
    """60 steps with a checkpoint every 5: long enough to be killed in between."""
    train_config = replace(recipe.pretrain.train, num_steps=60, checkpoint_every=5)
    return replace(recipe, pretrain=replace(recipe.pretrain, train=train_config))


@pytest.fixture(scope="module")
def undisturbed(stages, tmp_path_factory) -> str:
    """The folder of a run of `longer` that nothing disturbed."""
    output = str(tmp_path_factory.mktemp("undisturbed") / "out")
    pretrain(longer(stages.recipe), data=stages.data, output=output, cluster=stages.cluster, progress=False)
    return output


def assert_same_run(output: str, undisturbed: str) -> None:
    one, two = weights(undisturbed), weights(output)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [e.loss for e in read_metrics(output)] == [e.loss for e in read_metrics(undisturbed)]


def checkpoints(output: str) -> list[Path]:
    return list(Path(output, "checkpoints").glob("step-*/state.json"))


def test_a_killed_worker_changes_nothing(stages, undisturbed, tmp_path):
    """SIGKILL in the middle: Ray starts the worker again, the loop goes on from its checkpoint, the weights are equal."""
    output = str(tmp_path / "killed")
    victims: list[int] = []
    is_over = threading.Event()

    def workers() -> set[psutil.Process]:
        found = psutil.Process().children(recursive=True)
        return {process for process in found if "RayTrainWorker" in " ".join(_command(process))}

    of_before = workers()  # which are on their way out

    def kill_once() -> None:
        worker = None
        while not is_over.wait(0.01):
            if worker is None:  # looked for first: going through all processes takes long on a busy machine
                worker = next(iter(workers() - of_before), None)
            elif checkpoints(output):
                worker.kill()
                victims.append(worker.pid)
                return

    killer = threading.Thread(target=kill_once)
    killer.start()
    try:
        pretrain(
            longer(stages.recipe), data=stages.data, output=output, cluster=stages.cluster, progress=False
        )
    finally:
        is_over.set()
        killer.join()
    assert victims, "the run ended before the worker could be killed"
    assert_same_run(output, undisturbed)


@pytest.mark.slow  # tests/pipelines/test_prepare_corpus.py does it with the driver of another stage
def test_a_killed_driver_takes_its_ray_along_and_the_same_command_goes_on(
    stages, undisturbed, tmp_path, tracking_uri
):
    """SIGKILL of the process that the user started, with a Ray of its own; then the same command again."""
    output, recipe = str(tmp_path / "killed"), tmp_path / "recipe.json"
    recipe.write_text(to_json(longer(stages.recipe)))
    command = [sys.executable, "-m", "pipelines.pretrain", str(recipe), "--data", stages.data]
    command += ["--output", output, "--tracking-uri", tracking_uri]
    with open(tmp_path / "log", "wb") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, cwd=REPOSITORY)
        started: list[psutil.Process] = []
        try:
            for _ in range(2400):
                if checkpoints(output) or driver.poll() is not None:
                    break
                time.sleep(0.05)
            assert driver.poll() is None, (tmp_path / "log").read_text()
            # Ray's two agents end by themselves too, but only some time after they miss their raylet.
            children = psutil.Process(driver.pid).children(recursive=True)
            started = [p for p in children if "Agent" not in " ".join(_command(p))]
        finally:
            driver.kill()
            driver.wait()
    assert checkpoints(output)
    assert not Path(output, "manifest.json").exists()
    _, left = psutil.wait_procs(started, timeout=180)
    assert not left, f"still running: {[p.pid for p in left]}"
    pretrain(longer(stages.recipe), data=stages.data, output=output, cluster=stages.cluster, progress=False)
    assert_same_run(output, undisturbed)


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_an_interrupted_run_says_that_it_goes_on_and_leaves_no_process(
    stages, tmp_path, tracking_uri, number, code
):
    """Ctrl-C and SIGTERM while Ray trains, whose handlers are not ours."""
    output, recipe = str(tmp_path / "out"), tmp_path / "recipe.json"
    train_config = replace(stages.recipe.pretrain.train, num_steps=100_000, checkpoint_every=5)
    recipe.write_text(
        to_json(replace(stages.recipe, pretrain=replace(stages.recipe.pretrain, train=train_config)))
    )
    command = [
        sys.executable,
        "-m",
        "pipelines.pretrain",
        str(recipe),
        "--data",
        stages.data,
        "--no-progress",
    ]
    command += ["--output", output, "--tracking-uri", tracking_uri]

    def default() -> None:  # whoever runs the tests may ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with open(tmp_path / "log", "wb") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, cwd=REPOSITORY, preexec_fn=default)
        try:
            for _ in range(4800):
                if checkpoints(output) or driver.poll() is not None:
                    break
                time.sleep(0.05)
            assert driver.poll() is None, (tmp_path / "log").read_text()
            started = psutil.Process(driver.pid).children(recursive=True)
            # With the priority of the command: Ray would have it that they wait for everybody else.
            assert {_niceness(process) for process in started} - {None} == {psutil.Process(driver.pid).nice()}
            driver.send_signal(number)
            assert driver.wait(120) == code
        finally:
            driver.kill()
    lines = (tmp_path / "log").read_text().strip().splitlines()
    assert lines[-1] == "llada pretrain: interrupted; the same command goes on where it stopped"
    assert "Traceback" not in "".join(lines)
    _, left = psutil.wait_procs(started, timeout=180)
    assert not left, f"still running: {[p.pid for p in left]}"


@pytest.fixture
def small_disk(tmp_path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A file system of 1 MB of its own, and a function that sets its size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
    try:
        yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow  # each half by itself: tests/llada/training/checkpoint/test_save.py, tests/llada/test_store_errors.py
def test_a_full_disk_stops_training_with_one_line_and_nothing_is_lost(
    stages, undisturbed, tmp_path, small_disk
):
    disk, resize = small_disk
    options = {"data": stages.data, "output": str(disk / "out"), "cluster": stages.cluster, "progress": False}
    with pytest.raises(UserError, match=f"no space left while writing {disk}/out"):
        pretrain(longer(stages.recipe), **options)
    assert not Path(options["output"], "manifest.json").exists()
    resize("256m")
    pretrain(longer(stages.recipe), **options)
    assert_same_run(options["output"], undisturbed)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _niceness(process: psutil.Process) -> int | None:
    """None: it has ended meanwhile."""
    try:
        return process.nice()
    except psutil.Error:
        return None


@pytest.mark.slow  # test_what_the_user_can_mend_is_not_tried_again says it of any such error
def test_a_damaged_shard_that_one_worker_reads_ends_the_run_with_its_name(stages, corpus, tmp_path):
    """The other worker waits for it in a collective: nothing must hang, and nothing be tried again."""
    data = str(tmp_path / "data")
    config = replace(stages.recipe.prepare, rows_per_shard=4)
    prepare(config, inputs=[str(corpus / "text.jsonl")], output=data, cluster=stages.cluster, progress=False)
    shard = sorted(Path(data, "train").iterdir())[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{shard.name} has .* bytes instead of"):
        pretrain(
            longer(stages.recipe),
            data=data,
            output=str(tmp_path / "out"),
            cluster=ClusterConfig(num_workers=2),
            progress=False,
        )


RESULT = TrainResult(1, 64, 2.0, 2.5, 3.0, 1.0, 64.0, None)


def run(function: TrainFunction, output: Path, **cluster: Any) -> TrainResult:
    options = {"tracker": None, "label": "toy", "progress": False}
    return run_workers(function, output=str(output), cluster=ClusterConfig(**cluster), **options)


def attempts(file: Path) -> int:
    return len(file.read_text()) if file.exists() else 0


def test_a_function_of_ours_runs_on_every_worker_and_its_events_become_metrics(local_ray, tmp_path):
    def function(hooks: WorkerHooks) -> TrainResult:
        rank = int(os.environ["RANK"])
        assert torch.distributed.get_rank() == rank
        (tmp_path / f"rank{rank}").write_text(os.environ["WORLD_SIZE"])
        if rank == 0:
            there = (process.info for process in psutil.process_iter(["ppid", "cmdline"]))
            siblings = [info["cmdline"] or [] for info in there if info["ppid"] == os.getppid()]
            (tmp_path / "titles").write_text(" ".join(word for words in siblings for word in words))
            hooks.report(RunStarted(0, 1, 10, 3.0, "float32", 2))
            hooks.report(StepDone(1, 2.0, 0.1, 1.0, 64, 64.0, 0.5))
        return replace(RESULT, model=network)

    with torch.device("meta"):
        network = Transformer(ModelConfig(vocab_size=4, d_model=4, num_layers=1, num_heads=1, ffn_dim=4))
    assert run(function, tmp_path / "out", num_workers=2) == RESULT
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["2", "2"]
    # Who asks the Ray that was started last on this machine whether the run goes on, and would take the workers' places.
    titles = (tmp_path / "titles").read_text()
    assert "ray::RayTrainWorker" in titles
    # Ray's controller is in this process, and no worker reports to Ray, or asks for machines.
    others = (
        "PlacementGroupCleaner",
        "TrainController",
        "SynchronizationActor",
        "_QueueActor",
        "AutoscalingCoordinator",
    )
    assert [name for name in others if f"ray::{name}" in titles] == []
    assert [event.loss for event in read_metrics(str(tmp_path / "out"))] == [2.0]


def test_a_worker_that_stays_alone_is_in_no_process_group(local_ray, tmp_path):
    """Whose thread would look for messages all the time."""

    def function(hooks: WorkerHooks) -> TrainResult:
        assert not torch.distributed.is_initialized()
        return RESULT

    assert run(function, tmp_path / "out", num_workers=1) == RESULT


def test_what_the_user_can_mend_is_not_tried_again(local_ray, tmp_path):
    """Worker 0 waits in a collective for worker 1, which has met it: nothing hangs."""

    def function(hooks: WorkerHooks) -> TrainResult:
        with open(tmp_path / "attempts", "a") as file:
            file.write("x")
        if os.environ["RANK"] == "1":
            while attempts(tmp_path / "attempts") < 2:  # it is ended where it has not begun
                time.sleep(0.01)
            raise UserError("optim.lr is too high: lower it")
        torch.distributed.all_reduce(torch.zeros(1))
        return RESULT

    with pytest.raises(UserError, match=r"^optim\.lr is too high: lower it$"):
        run(function, tmp_path / "out", num_workers=2)
    assert attempts(tmp_path / "attempts") == 2


def test_a_fault_of_ours_is_tried_again_and_keeps_its_remote_traceback(local_ray, tmp_path):
    """A ValueError that is no UserError must neither become one line nor lose where it was raised."""

    def deep_down(depth: int) -> TrainResult:
        if depth:
            return deep_down(depth - 1)
        raise ValueError("operands could not be broadcast together")

    def function(hooks: WorkerHooks) -> TrainResult:
        with open(tmp_path / "attempts", "a") as file:
            file.write("x")
        return deep_down(30)  # longer than what Ray shows of a traceback

    with pytest.raises(Exception, match="operands could not be broadcast") as caught:
        run(function, tmp_path / "out", max_failures=1)
    assert not isinstance(caught.value, UserError)
    assert attempts(tmp_path / "attempts") == 2
    notes = "\n".join(caught.value.__notes__)
    assert "2 failures without a new checkpoint in between" in notes
    assert "run the same command again" in notes
    assert "On worker 0:\nTraceback (most recent call last)" in notes
    assert "in function" in notes
    assert "in deep_down" in notes
    assert notes.rstrip().endswith("ValueError: operands could not be broadcast together")


@pytest.mark.slow  # what is decided: test_failure_budget.py; one kind of failure at a time: the others here
def test_failures_count_only_without_a_new_checkpoint_and_a_store_may_come_back(
    local_ray, tmp_path, monkeypatch
):
    """Four attempts fail, of which no two in a row make no checkpoint: by an exception that cannot be pickled, a store that
    is away for a moment, a killed process, and because the worker was asked to leave."""
    output = tmp_path / "out"
    monkeypatch.setattr(failure_budget, "FIRST_PAUSE_S", 0.1)

    class OddError(Exception):
        def __init__(self, one: str, two: str) -> None:
            super().__init__(one)

    def function(hooks: WorkerHooks) -> TrainResult:
        with open(tmp_path / "attempts", "a") as file:
            file.write("x")
        number = len((tmp_path / "attempts").read_text())
        if number in (1, 3):
            checkpoint = output / "checkpoints" / f"step-{number:08d}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "state.json").write_text("{}")
        if number == 1:
            raise OddError("the network", "was away")
        if number == 2:
            error = StoreError("s3://bucket: the store is overloaded; run the same command again")
            error.may_pass = True
            raise error
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 4:
            raise PreemptedError
        return RESULT

    assert run(function, output, max_failures=1) == RESULT
    assert attempts(tmp_path / "attempts") == 5


@pytest.mark.slow
def test_workers_that_die_as_they_start_leave_their_places_to_the_next_ones(local_ray, tmp_path):
    """All CPUs of this Ray are needed for a group."""

    class DiesWhereItArrives:
        def __reduce__(self) -> tuple[Any, ...]:
            return arrive, (tmp_path / "arrived",)

    def arrive(file: Path) -> None:
        with open(file, "a") as stream:
            stream.write("x")
        if attempts(file) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def function(cargo: object, hooks: WorkerHooks) -> TrainResult:
        return RESULT

    cargo = DiesWhereItArrives()
    assert run(partial(function, cargo), tmp_path / "out", num_workers=2, max_failures=1) == RESULT
    assert attempts(tmp_path / "arrived") > 2


@pytest.mark.parametrize("when", ["while they start", pytest.param("at work", marks=pytest.mark.slow)])
def test_an_interrupted_training_leaves_the_places_to_the_next_one_of_the_process(local_ray, tmp_path, when):
    """Ray's controller is in this process, which goes on."""
    driver = os.getpid()

    class InterruptsWhereItArrives:
        def __reduce__(self) -> tuple[Any, ...]:
            return interrupt, ()

    def press() -> None:
        with contextlib.suppress(FileExistsError):
            (tmp_path / "pressed").touch(exist_ok=False)  # once: a second one may come when all is over
            os.kill(driver, signal.SIGINT)
        time.sleep(60)

    def interrupt() -> None:
        if when == "while they start":
            press()

    def function(cargo: object, hooks: WorkerHooks) -> TrainResult:
        press()
        return RESULT

    def default() -> Any:  # of a process that is no command
        return signal.signal(signal.SIGINT, signal.default_int_handler)

    before = default()
    try:
        with (
            contextlib.nullcontext() if when == "at work" else interruptible(),
            pytest.raises(KeyboardInterrupt),
        ):
            run(partial(function, InterruptsWhereItArrives()), tmp_path / "out", num_workers=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert run(lambda hooks: RESULT, tmp_path / "next", num_workers=2) == RESULT


def test_a_store_that_does_not_come_back_is_one_line(local_ray, tmp_path):
    def function(hooks: WorkerHooks) -> TrainResult:
        error = StoreError("s3://bucket: the store is overloaded; run the same command again")
        error.may_pass = True
        raise error

    with pytest.raises(UserError, match="^s3://bucket: the store is overloaded"):
        run(function, tmp_path / "out", store_patience_s=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_store_that_is_away_while_workers_start_again_is_waited_for(
    local_ray, s3_url, s3_gateway, tmp_path, monkeypatch, caplog
):
    """Away for two attempts more, where no failure is allowed; what Ray and the budget look at is in it, too."""
    monkeypatch.setattr(failure_budget, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(files, "_PAUSES_S", (0.1,))
    output = f"{s3_url}/{tmp_path.name}"
    files.write_bytes(f"{output}/text", b"there")
    is_over = threading.Event()

    def function(hooks: WorkerHooks) -> TrainResult:
        files._PAUSES_S = (0.1,)  # in this process
        with open(tmp_path / "attempts", "a") as file:
            file.write("x")
        while attempts(tmp_path / "attempts") < 4:
            files.read_bytes(f"{output}/text")
            time.sleep(0.05)
        return RESULT

    def disturb() -> None:
        for number in (1, 4):
            while attempts(tmp_path / "attempts") < number and not is_over.wait(0.05):
                pass
            (s3_gateway.close if number == 1 else s3_gateway.open)()

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        options = {"tracker": None, "label": "toy", "progress": False}
        result = run_workers(function, output=output, cluster=ClusterConfig(max_failures=0), **options)
    finally:
        is_over.set()
        disturber.join()
    assert result == RESULT
    assert attempts(tmp_path / "attempts") == 4
    assert "the workers start again in" in caplog.text


@pytest.mark.slow  # its parts: test_preemption.py, test_failure_budget.py, tests/llada/training/test_parallel.py
def test_a_worker_that_is_asked_to_leave_does_so_in_good_order(local_ray, tmp_path):
    """SIGTERM to one of two workers; both leave, and start again."""

    def function(hooks: WorkerHooks) -> TrainResult:
        with open(tmp_path / "attempts", "a") as file:
            file.write("x")
        departure = Departure(hooks.should_stop)
        if attempts(tmp_path / "attempts") > 2:
            return RESULT
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        while not departure.agreed():
            time.sleep(0.01)
        raise PreemptedError

    assert run(function, tmp_path / "out", num_workers=2, max_failures=0) == RESULT
    assert attempts(tmp_path / "attempts") == 4


def test_a_worker_that_hangs_is_reported_with_all_stacks_and_started_again(
    local_ray, tmp_path, caplog, monkeypatch
):
    """Worker 0 waits in a collective for worker 1, which sleeps."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

    def sleep_forever() -> None:
        while True:
            time.sleep(0.1)

    def function(hooks: WorkerHooks) -> TrainResult:
        with open(tmp_path / "attempts", "a") as file:
            file.write("x")
        if attempts(tmp_path / "attempts") > 2:
            return RESULT
        for number in range(20):
            hooks.enter("step")
            if number == 10 and os.environ["RANK"] == "1":
                sleep_forever()
            torch.distributed.all_reduce(torch.zeros(1))
        return RESULT

    assert run(function, tmp_path / "out", num_workers=2, max_failures=1, hang_timeout_s=1) == RESULT
    assert caplog.text.count("a step has not ended for") == 1
    stacks = (tmp_path / "out" / "logs" / "hangs.log").read_text()
    assert "in sleep_forever" in stacks
    assert "in all_reduce" in stacks


def test_a_driver_that_hears_nothing_fails_no_step(local_ray, tmp_path):
    """What leads to it is gone in the middle: steps are done, their log is kept, the result arrives."""

    def function(hooks: WorkerHooks) -> TrainResult:
        hooks.report(RunStarted(0, 2, 10, 3.0, "float32", 1))
        (reporter,) = (
            cell.cell_contents for cell in hooks.report.__closure__ if hasattr(cell.cell_contents, "tell")
        )
        reporter.events.remove()
        for number in (1, 2):
            hooks.report(StepDone(number, 2.0, 0.1, 1.0, 64, 64.0, 0.5))
        return RESULT

    assert run(function, tmp_path / "out") == RESULT
    assert [event.step for event in read_metrics(str(tmp_path / "out"))] == [1, 2]


LOST_NODE = """
import os, sys, threading, time
import ray
from ray._common.utils import reset_ray_address
from ray.cluster_utils import Cluster
from llada.training.events import RunStarted, StepDone
from llada.training.trainer import TrainResult
from pipelines.runners.workers import run_workers
from pipelines.stage.cluster import ClusterConfig

folder = sys.argv[1]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
others = [cluster.add_node(num_cpus=0) for _ in range(2)]  # where no worker has a place
cluster.wait_for_nodes()
reset_ray_address()  # written for the whole machine: whoever joins a Ray without an address would look for this one

def function(hooks):
    hooks.report(RunStarted(0, 100, 10, 3.0, "float32", 1))
    open(folder + "/begun", "w").close()
    while not os.path.exists(folder + "/lost"):
        time.sleep(0.1)
    with open(folder + "/attempts", "a") as file:
        file.write("x")
    hooks.report(StepDone(1, 2.0, 0.1, 1.0, 64, 64.0, 0.5))
    return TrainResult(1, 64, 2.0, 2.5, 3.0, 1.0, 64.0, None)

def lose():
    while not os.path.exists(folder + "/begun"):
        time.sleep(0.1)
    for node in others:
        cluster.remove_node(node, allow_graceful=False)
    open(folder + "/lost", "w").close()

threading.Thread(target=lose, daemon=True).start()
config = ClusterConfig(address=cluster.address)
result = run_workers(function, output=folder + "/out", cluster=config, tracker=None, label="toy", progress=False)
print("steps", result.num_steps, open(folder + "/attempts").read(), flush=True)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_lost_node_without_workers_changes_nothing(tmp_path):
    """What the driver and the workers talk through stands on the driver's own node."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", LOST_NODE, str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.stdout.strip().splitlines()[-1:] == ["steps 1 x"], done.stdout + done.stderr
