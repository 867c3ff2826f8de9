"""`llada prepare` on this machine: speed beside the bare tokenizer, memory of workers and driver as the input grows.

    python tests/benchmarks/prepare_scale.py --text FILE.jsonl.gz --tokenizer FOLDER [--units N ...]

1. Tokenise and pack: a run without filters and deduplication on all cores, beside the tokenizer alone on the same text
   on all cores (a process each), both in tokens per second of wall time once the workers are warm.
2. Memory of a worker: the whole of it (filters, deduplication, packing) on 1, 4 and 16 times the text; the largest
   memory that belongs to one process alone (USS), sampled ten times a second.
3. Memory of the driver: plans of 1,000 to 100,000 units; every step that the driver has a part in, with tasks that do
   nothing (the list of shards and the reports are made up).
Prints tables and writes results/prepare_scale.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from llada.data.dedup import DedupConfig  # noqa: E402
from llada.data.documents import InputFile, Part  # noqa: E402
from llada.data.group_tasks import group_shards  # noqa: E402
from llada.data.prepare import Job, PrepareConfig  # noqa: E402
from llada.data.reading import ReadConfig  # noqa: E402
from llada.data.reports import Report, merge  # noqa: E402
from llada.data.shards import write_index  # noqa: E402
from llada.data.units import UNITS_PER_GROUP, write_plan  # noqa: E402
from llada.tokenizer import encode_texts, load_tokenizer  # noqa: E402
from pipelines.cluster import ClusterConfig, connect  # noqa: E402
from pipelines.prepare import prepare  # noqa: E402
from pipelines.task_map import map_tasks  # noqa: E402

MIB = 1 << 20
PAIRS = 3


def read_texts(path: str) -> list[str]:
    with gzip.open(path, "rt") as lines:
        return [json.loads(line)["text"] for line in lines]


def write_parts(folder: Path, texts: list[str], parts: int, copy: int = 0) -> None:
    """The texts in `parts` files; copies differ in every line, so that nothing is a duplicate."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(parts):
        with open(folder / f"{copy:02d}-{part:02d}.jsonl", "w") as file:
            for text in texts[part::parts]:
                marked = text if copy == 0 else "".join(w + chr(0x61 + copy) for w in text.split(" "))
                file.write(json.dumps({"text": marked}) + "\n")


# --- 1: speed ---------------------------------------------------------------------------------------------------------


def bare(arguments: tuple[str, list[str]]) -> tuple[int, float, float]:
    """(tokens, begin, end) of the tokenizer alone on a share of the texts, batch by batch as the pipeline feeds it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(arguments[0])
    encode_texts(tokenizer, arguments[1][:100])
    begin, tokens, batch, size = time.time(), 0, [], 0
    for text in arguments[1]:
        batch.append(text)
        size += len(text)
        if size >= MIB:
            tokens += sum(map(len, encode_texts(tokenizer, batch)))
            batch, size = [], 0
    tokens += sum(map(len, encode_texts(tokenizer, batch))) if batch else 0
    return tokens, begin, time.time()


def measure_speed(texts: list[str], tokenizer: str, cores: int, folder: Path) -> dict:
    write_parts(folder / "speed", texts, 4 * cores)
    config = PrepareConfig(
        row_length=1024,
        tokenizer=tokenizer,
        validation_fraction=0.001,
        unit_bytes=sum(len(text) for text in texts) // (8 * cores),
    )
    pairs = []
    with connect(ClusterConfig(num_cpus=cores), folder / "logs"):
        fixed = min(
            _fixed_seconds(config, folder / f"fixed{n}") for n in range(2)
        )  # the first one starts the workers
        for turn in range(PAIRS):
            with multiprocessing.get_context("spawn").Pool(cores) as pool:
                found = pool.map(bare, [(tokenizer, texts[core::cores]) for core in range(cores)])
            alone = sum(f[0] for f in found) / (max(f[2] for f in found) - min(f[1] for f in found))
            begin = time.time()
            manifest = prepare(
                config,
                inputs=[str(folder / "speed")],
                output=str(folder / f"out{turn}"),
                cluster=ClusterConfig(),
                progress=False,
            )
            counts, seconds = manifest["counts"], time.time() - begin
            tokens = counts["train_tokens"] + counts["validation_tokens"]
            pairs.append(
                {"bare": alone, "prepare": tokens / (seconds - fixed), "with_fixed": tokens / seconds}
            )
            print("tokenizer alone {bare:9,.0f} tokens/s, prepare {prepare:9,.0f}".format(**pairs[-1]))
    ratios = sorted(pair["prepare"] / pair["bare"] for pair in pairs)
    print(
        f"prepare / tokenizer alone, {cores} cores, median of {PAIRS} turns: {ratios[PAIRS // 2]:.2f}", end=""
    )
    print(f" (without the {fixed:.1f} s that any run takes)")
    return {"tokens": tokens, "fixed_seconds": fixed, "tokens_per_second": pairs, "ratio": ratios[PAIRS // 2]}


def _fixed_seconds(config: PrepareConfig, folder: Path) -> float:
    """What a run of a single document takes: plan, Ray Data's start, lists, report."""
    write_parts(folder / "one", ["one document"], 1)
    begin = time.time()
    one = replace(config, validation_fraction=0.0)
    prepare(
        one,
        inputs=[str(folder / "one")],
        output=str(folder / "one-out"),
        cluster=ClusterConfig(),
        progress=False,
    )
    return time.time() - begin


# --- 2: memory of workers ---------------------------------------------------------------------------------------------


class Watch:
    """The largest USS of the driver and of any Ray worker while a `with` block runs."""

    def __enter__(self) -> Watch:
        self.worker = self.driver = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.1):
            self.driver = max(self.driver, me.memory_full_info().uss)
            for process in me.children(recursive=True):
                try:
                    if "ray::" in " ".join(process.cmdline()):
                        self.worker = max(self.worker, process.memory_full_info().uss)
                except psutil.Error:
                    continue


def measure_workers(texts: list[str], tokenizer: str, cores: int, folder: Path) -> list[dict]:
    config = PrepareConfig(
        row_length=1024,
        tokenizer=tokenizer,
        read=ReadConfig(filters=("web",)),
        dedup=DedupConfig(),
        unit_bytes=4 * MIB,
        rows_per_shard=1024,
    )
    rows = []
    for times in (1, 4, 16):
        source = folder / f"x{times}"
        for copy in range(times):
            write_parts(source, texts, 4, copy)
        size = sum(file.stat().st_size for file in source.iterdir())
        with connect(ClusterConfig(num_cpus=cores), folder / "logs"), Watch() as watch:
            begin = time.time()
            prepare(
                config,
                inputs=[str(source)],
                output=str(folder / f"x{times}-out"),
                cluster=ClusterConfig(),
                progress=False,
            )
        rows.append(
            {
                "times": times,
                "megabytes": size / 1e6,
                "seconds": time.time() - begin,
                "worker_mib": watch.worker / MIB,
                "driver_mib": watch.driver / MIB,
            }
        )
        print(
            "{times:3d} x text {megabytes:7.1f} MB: worker {worker_mib:6.0f} MiB, driver {driver_mib:6.0f} MiB".format(
                **rows[-1]
            )
        )
        shutil.rmtree(folder / f"x{times}-out")
        shutil.rmtree(source)
    return rows


# --- 3: memory of the driver ------------------------------------------------------------------------------------------


def nothing(number: int) -> int:
    return 1


def drive(units: int) -> None:
    """The driver's work for so many units, in a process of its own; prints its memory as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        files = (
            (
                "",
                Part(
                    InputFile(f"s3://bucket/crawl/{n:08d}.jsonl.gz", f"{n:08d}.jsonl.gz", 64 * MIB, "e"),
                    64 * MIB,
                ),
            )
            for n in range(units)
        )
        plan = write_plan(f"{folder}/plan", files, 64 * MIB)
        assert plan is not None
        job = Job(PrepareConfig(), folder, f"{folder}/snapshot", plan)
        shard = {
            "split": "train",
            "source": "",
            "rows": 4096,
            "segments": 9000,
            "tokens": 16 << 20,
            "bytes": 1 << 26,
        }
        report = Report(
            "",
            UNITS_PER_GROUP,
            64 * MIB,
            {"en": {"kept": [10**6, 10**9], "gopher_quality.few_words": [1, 1]}},
        )
        for group in range(plan.groups):
            shards = [
                {**shard, "name": f"train/{unit.name()}-000.safetensors", "sha256": f"{group:064x}"}
                for unit in plan.group(group)
            ]
            stem = Path(folder, "snapshot/groups", f"{group:06d}")
            stem.parent.mkdir(parents=True, exist_ok=True)
            Path(f"{stem}.shards").write_text(json.dumps(shards))
            Path(f"{stem}.reports").write_text(json.dumps([asdict(report)]))
        before = psutil.Process().memory_full_info().uss
        with connect(ClusterConfig(num_cpus=os.cpu_count()), f"{folder}/logs"), Watch() as watch:
            begin = time.time()
            assert sum(result for _, result in map_tasks(nothing, range(units), ClusterConfig())) == units
            seconds = time.time() - begin
            total = Report()
            for group in range(plan.groups):
                path = Path(folder, "snapshot/groups", f"{group:06d}.reports")
                total = merge([total, *(Report(**entry) for entry in json.loads(path.read_text()))])
            assert total.units == UNITS_PER_GROUP * plan.groups
            write_index(
                f"{folder}/train.parquet", (s for g in range(plan.groups) for s in group_shards(job, g))
            )
        print(
            json.dumps(
                {
                    "units": units,
                    "before_mib": before / MIB,
                    "driver_mib": watch.driver / MIB,
                    "seconds": seconds,
                }
            )
        )


def measure_driver(counts: list[int]) -> list[dict]:
    rows = []
    for units in counts:
        command = [sys.executable, __file__, "--drive", str(units)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(printed.splitlines()[-1]))
        print(
            "{units:7,d} units: driver {driver_mib:5.0f} MiB, {seconds:6.1f} s of empty tasks".format(
                **rows[-1]
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text")
    parser.add_argument("--tokenizer")
    parser.add_argument("--units", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--drive", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        drive(arguments.drive)
        return
    texts = read_texts(arguments.text)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    cpu = next(
        (
            line.split(": ")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    import ray
    import tokenizers

    with tempfile.TemporaryDirectory() as folder:
        result = {
            "machine": {
                "cpu": cpu,
                "cores": arguments.cores,
                "python": platform.python_version(),
                "commit": commit,
            },
            "versions": {"ray": ray.__version__, "tokenizers": tokenizers.__version__},
            "text_megabytes": sum(len(text.encode()) for text in texts) / 1e6,
            "speed": measure_speed(texts, arguments.tokenizer, arguments.cores, Path(folder)),
            "workers": measure_workers(texts[:4000], arguments.tokenizer, arguments.cores, Path(folder)),
            "driver": measure_driver(arguments.units),
        }
    (HERE / "results" / "prepare_scale.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
