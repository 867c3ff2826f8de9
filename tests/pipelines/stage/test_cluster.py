import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llada.errors import UserError
from pipelines.stage.cluster import ClusterConfig, connect, load_cluster, require_room

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "ray_configs").glob("*.yaml"))


def test_shipped_files_load():
    """`llada check` reads them all (tests/pipelines/test_check.py); these are what a stage runs on."""
    others = ("serve", "serve_8b", "aws")
    loaded = {path.stem: load_cluster(path) for path in CONFIGS if path.stem not in others}
    own, joined = ("local", "cpu_node", "gpu_node"), ("cpu_cluster", "cluster", "kubernetes")
    assert set(loaded) == {*own, *joined}
    assert all(loaded[name].address is None for name in own)
    assert all(loaded[name].address == "auto" for name in joined)
    assert {name for name in loaded if loaded[name].gpus_per_worker} == {"gpu_node", "cluster", "kubernetes"}
    assert loaded["gpu_node"].num_workers == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_worker: 2", "unknown setting .*mine.yaml: num_worker; did you mean 'num_workers'"),
        ("learning_rate: 1", "unknown setting .*mine.yaml: learning_rate; known: address,"),
        ("num_workers: two", r"num_workers must be int or \(int, int\), not 'two'"),
        ("num_workers: [3, 1]", r"num_workers are \[least, most\], not \[3, 1\]"),
        ("num_workers: [0, 1]", "num_workers must be at least 1, not 0"),
        ("num_workers: true", r"num_workers must be int or \(int, int\), not True"),
        ("runtime_env: [1]", "runtime_env must be"),
        ("- 1", "must hold 'key: value' lines"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_cluster(path)


def test_numbers_and_nothing(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("cpus_per_worker: 0.5\ngpus_per_worker: 1\naddress: null\n")
    assert load_cluster(path) == ClusterConfig(cpus_per_worker=0.5, gpus_per_worker=1)
    path.write_text("")
    assert load_cluster(path) == ClusterConfig()
    with pytest.raises(UserError, match=r"cannot read the cluster file .*none\.yaml"):
        load_cluster(tmp_path / "none.yaml")


@pytest.mark.integration
def test_ray_talks_into_the_file_only(local_ray, capfd):
    import ray.data

    logging.getLogger("ray").warning("a word from Ray")
    assert ray.data.range(3).map_batches(lambda batch: batch).count() == 3
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    text = local_ray.read_text()
    assert "a word from Ray" in text
    assert "ray.data" in text


@pytest.mark.integration
def test_a_running_ray_is_used_and_left_running(local_ray, tmp_path):
    import ray

    with connect(ClusterConfig(), tmp_path):
        pass
    assert ray.is_initialized()


@pytest.mark.integration
def test_what_a_ray_of_our_own_can_never_run_is_refused(local_ray):
    require_room("num_workers", 2, 1)
    require_room("num_workers", 4, 0.5)
    with pytest.raises(
        UserError, match=r"no room for 3 × 1 CPU \(num_workers\): this Ray has 2 CPU and 0 GPU;"
    ):
        require_room("num_workers", 3, 1)
    with pytest.raises(
        UserError, match=r"no room for 1 × 1 CPU and 0\.5 GPU \(num_workers\): this Ray has 2 CPU"
    ):
        require_room("num_workers", 1, 1, 0.5)


BEFORE_A_JOB_OF = """
import os, sys
from ray.cluster_utils import Cluster
from llada.errors import UserError
from pipelines.stage.cluster import ClusterConfig, connect, require_room

nodes = Cluster()
for _ in range(2):
    nodes.add_node(num_cpus=1, object_store_memory=100 << 20)
environment = {"env_vars": {"OF_BOTH": "the file's", "OF_THE_FILE": "1"}}
try:
    with connect(ClusterConfig(address=nodes.address, runtime_env=environment), sys.argv[1]):
        import ray
        print(ray.get(ray.remote(lambda: [os.environ.get(n) for n in ("OF_BOTH", "OF_THE_FILE", "OF_THE_JOB")]).remote()))
        require_room("num_workers", 2, 1)
        for number, cpus in ((1, 2), (3, 1)):
            require_room("num_workers", number, cpus)
finally:
    nodes.shutdown()
"""


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_a_job_on_machines_of_others(tmp_path):
    """Two machines: what does not fit on any of them is said at once, and waited for. And a job's environment stands
    beside the cluster file's, where Ray itself refuses to be told twice."""
    job = {"runtime_env": {"env_vars": {"OF_BOTH": "the job's", "OF_THE_JOB": "1"}}, "metadata": {}}
    done = subprocess.run(
        [sys.executable, "-c", BEFORE_A_JOB_OF, str(tmp_path)],
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)},
        capture_output=True,
        text=True,
        timeout=580,
        cwd=Path(__file__).resolve().parents[3],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[\"the job's\", '1', '1']"
    assert [line for line in done.stderr.splitlines() if line.startswith("no room yet")] == [
        f"no room yet for {asked} (num_workers): the cluster has 2 × 1 CPU and 0 GPU; machines are waited for"
        for asked in ("1 × 2 CPU", "3 × 1 CPU")
    ]


def test_an_absent_cluster_is_reported_quickly(tmp_path, free_port):
    """In a process of its own, because this one may have joined a Ray already."""
    port = free_port()
    program = (
        "import sys, time; from pipelines.stage.cluster import *; from llada.errors import UserError\n"
        "for address in sys.argv[2:]:\n"
        "    begin = time.monotonic()\n"
        "    try:\n"
        "        with connect(ClusterConfig(address=address), sys.argv[1]): print('joined')\n"
        "    except UserError as error: print(error, time.monotonic() - begin)\n"
    )
    addresses = [f"127.0.0.1:{port}", f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), *addresses],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).resolve().parents[3],
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for address, line in zip(addresses, lines, strict=True):
        assert line.startswith(f"no Ray cluster at {address}")
        assert "ray_configs/local.yaml" in line
    # Ray itself keeps trying for minutes. The first one has imported it.
    assert all(float(line.rsplit(" ", 1)[1]) < 30 for line in lines[1:]), lines


def start_ray(folder: Path, preparation: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process that starts a Ray of its own, after some `preparation`."""
    program = (
        "import sys\n"
        "from pipelines.stage import cluster, own_ray\n"
        "from pipelines.stage.command import exit_codes\n"
        f"{preparation}\n"
        "with exit_codes('prepare'), cluster.connect(cluster.ClusterConfig(num_cpus=1), sys.argv[1]):\n"
        "    print('started')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=580,
        cwd=Path(__file__).resolve().parents[3],
        check=False,
    )


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(600)
def test_a_slow_start_is_waited_for(tmp_path):
    """A raylet that stands still for 35 s, as on a machine with other work: Ray itself gives up after 30."""
    begin = time.monotonic()
    done = start_ray(
        tmp_path, AS_SOON_AS_THERE_IS_A_RAYLET.format("suspend(); time.sleep(35); process.resume()")
    )
    assert (done.returncode, done.stdout) == (0, "started\n"), done.stderr
    assert time.monotonic() - begin > 35


# What is done to a process of that name.
AS_SOON_AS_THERE_IS_A_RAYLET = """
import threading, time, psutil
def handle():
    while True:
        for process in psutil.Process().children(recursive=True):
            if process.name() == "raylet":
                process.{}
                return
        time.sleep(0.01)
threading.Thread(target=handle, daemon=True).start()
"""


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("what", "patience_s"), [("suspend()", 5), ("kill()", 500)])
def test_a_start_that_hangs_or_fails_is_one_line(tmp_path, what, patience_s):
    """The raylet is stopped as soon as it is there; or it dies, for which nobody waits."""
    preparation = f"own_ray.START_TIMEOUT_S = {patience_s}\n{AS_SOON_AS_THERE_IS_A_RAYLET.format(what)}"
    done = start_ray(tmp_path, preparation)
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("llada prepare: Ray did not start on this machine: "), done.stderr
    assert "Traceback" not in done.stderr


GOODBYE = """
import json, pathlib, sys
import psutil
from llada.errors import UserError
from pipelines.stage.cluster import ClusterConfig, connect, until_exit
from pipelines.stage.command import exit_codes

folder, how = sys.argv[1:]
with until_exit(), exit_codes("toy"):
    with connect(ClusterConfig(num_cpus=1), folder):
        import ray
        assert ray.get(ray.remote(lambda: 1).remote()) == 1
        started = psutil.Process().children(recursive=True)
        if how == "lost":
            (raylet,) = (process for process in started if process.name() == "raylet")
            raylet.kill()
            raylet.wait()
    pathlib.Path(folder, "started.json").write_text(json.dumps([process.pid for process in started]))
    if how == "refused":
        raise UserError("no")
"""


@pytest.mark.integration
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        # tests/pipelines/test_prepare.py: a process of its own is quiet.
        pytest.param("well", 0, "", marks=pytest.mark.slow),
        ("lost", 0, ""),
        pytest.param("refused", 1, "llada toy: no\n", marks=pytest.mark.slow),
    ],
)
def test_the_exit_code_tells_of_our_work_and_not_of_rays_goodbye(tmp_path, how, code, said):
    """In ray.shutdown, a process whose raylet is gone ends with code 1."""
    done = subprocess.run(
        [sys.executable, "-c", GOODBYE, str(tmp_path), how],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=Path(__file__).resolve().parents[3],
        check=False,
    )
    assert (done.returncode, done.stderr) == (code, said)
    started = json.loads((tmp_path / "started.json").read_text())
    assert len(started) > 3
    # The agents of a raylet that was killed are nobody's children; Ray lets them notice it after a minute, for which nobody waits.
    for pid in started if how == "lost" else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 180
    while left := [pid for pid in started if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
