"""`llada prepare` on this machine: speed beside the bare tokenizer, memory of workers and driver as the input grows.

    python tests/benchmarks/prepare_scale.py [--text FILE.jsonl.gz] [--tokenizer FOLDER] [--units N ...] [--results FOLDER]

1. Tokenise and pack: a run without filters and deduplication on all cores, beside the tokenizer alone on the same text
   on all cores (a process each), both in tokens per second of wall time once the workers are warm.
2. Memory of a worker: the whole of it (filters, deduplication, packing) on 1, 4 and 16 times the text; the largest
   memory that belongs to one process alone (USS), sampled ten times a second.
3. Memory of the driver: 1,000 to 100,000 units, written as a plan and recognised as known files, mapped on Ray with
   tasks that do nothing, deduplicated with such tasks, their (made up) reports and lists of shards put together.
Prints tables and writes prepare_scale.json. --quick takes little data, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from llada.data.batching import batches  # noqa: E402
from llada.data.dedup.steps import DedupConfig, deduplicate, plan_dedup  # noqa: E402
from llada.data.outcomes import Report, merge  # noqa: E402
from llada.data.read.parts import InputFile, Part  # noqa: E402
from llada.data.tokens.encoding import ENCODED_CHARS  # noqa: E402
from llada.data.tokens.manifest import ShardEntry, write_index  # noqa: E402
from llada.data.work.config import PrepareConfig  # noqa: E402
from llada.data.work.job import Job, Snapshot  # noqa: E402
from llada.data.work.read_config import ReadConfig  # noqa: E402
from llada.data.work.results import write_list  # noqa: E402
from llada.data.work.tasks import group_reports, group_shards  # noqa: E402
from llada.data.work.units import UNITS_PER_GROUP, SeenFiles, write_plan  # noqa: E402
from llada.tokenizer import ensure_special_tokens, load_tokenizer, save_tokenizer  # noqa: E402
from pipelines.corpus.duplicates import KeysUrls  # noqa: E402
from pipelines.prepare import prepare  # noqa: E402
from pipelines.runners.tasks import map_tasks  # noqa: E402
from pipelines.stage.cluster import ClusterConfig, connect  # noqa: E402

MIB = 1 << 20
UNITS_PER_CORE = 3
# Of the deduplication: the default, 2^24, would be one task for all that is measured here.
ROWS_PER_TASK = 1 << 17
COPIES = 4  # at 1 x: enough for a worker's caches of words to fill


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    turns: int = 5
    speed_bytes: int = 48 << 20
    """Text for each core."""
    times: tuple[int, ...] = (1, 4, 16)
    """Copies of the text for the memory of workers, in units of COPIES."""
    units: tuple[int, ...] = (1000, 10_000, 100_000)


QUICK = Scale(turns=1, speed_bytes=1 << 20, times=(1,), units=(100,))


def read_texts(path: str | Path) -> list[str]:
    with gzip.open(path, "rt") as lines:
        return [json.loads(line)["text"] for line in lines]


def write_parts(folder: Path, texts: list[str], parts: int, copy: int = 0) -> None:
    """The texts in `parts` files. In a further copy every fourth word is another one of the text: it shares no five
    words in a row with any other copy, and the filters think of it nearly what they think of the text."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = random.Random(copy)

    def changed(text: str) -> str:
        words = text.split(" ")
        places = range(0, len(words), 4)
        for place, word in zip(places, chosen.choices(words, k=len(places)), strict=True):
            words[place] = word
        return " ".join(words)

    for part in range(parts):
        with open(folder / f"{copy:02d}-{part:02d}.jsonl", "w") as file:
            for text in texts[part::parts]:
                copied = changed(text) if copy else text
                file.write(json.dumps({"text": copied}) + "\n")


# --- 1: speed ---------------------------------------------------------------------------------------------------------


def bare(arguments: tuple[str, list[str]]) -> tuple[int, float, float]:
    """(tokens, begin, end) of the tokenizers library alone on a share of the texts, as much at a time as prepare gives it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    folder, texts = arguments
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.encode_batch_fast(texts[:100])
    begin, tokens = time.time(), 0
    for batch in batches(texts, len, ENCODED_CHARS):
        tokens += sum(len(e.ids) for e in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
    return tokens, begin, time.time()


def measure_speed(texts: list[str], tokenizer: str, cores: int, folder: Path, scale: Scale) -> dict:
    """Both on the same texts, turn by turn, each time in new processes; a work unit is a file, of equal size."""
    texts = texts * max(1, round(scale.speed_bytes * cores / sum(map(len, texts))))
    write_parts(folder / "speed", texts, UNITS_PER_CORE * cores)
    write_parts(folder / "warm", texts[:1000], UNITS_PER_CORE * cores)
    write_parts(folder / "little", ["a document"], 1)
    completed = folder / "tokenizer"  # with the special tokens that prepare adds, for both
    save_tokenizer(ensure_special_tokens(load_tokenizer(tokenizer)), completed)

    def timed(name: str, turn: int) -> tuple[int, float]:
        """(tokens, seconds) of a run over a folder."""
        largest = max(file.stat().st_size for file in (folder / name).iterdir())
        config = PrepareConfig(row_length=1024, tokenizer=str(completed), unit_bytes=largest)
        begin = time.time()
        counts = run(config, folder / name, folder / f"{name}-{turn}")["counts"]
        shutil.rmtree(folder / f"{name}-{turn}")
        return counts["train_tokens"] + counts["validation_tokens"], time.time() - begin

    turns = []
    for turn in range(scale.turns):
        with multiprocessing.get_context("spawn").Pool(cores) as pool:
            found = pool.map(bare, [(str(completed), texts[core::cores]) for core in range(cores)])
        alone = sum(f[0] for f in found) / (max(f[2] for f in found) - min(f[1] for f in found))
        with connect(ClusterConfig(num_cpus=cores), folder / "logs"):
            timed("warm", turn)  # starts the workers, which load their libraries
            _, fixed = timed("little", turn)
            tokens, seconds = timed("speed", turn)
        rates = {"bare": alone, "prepare": tokens / (seconds - fixed), "with_fixed": tokens / seconds}
        turns.append(rates | {"fixed_seconds": fixed})
        print("tokenizer alone {bare:9,.0f} tokens/s, prepare {prepare:9,.0f}".format(**rates))
    ratio = sorted(rates["prepare"] / rates["bare"] for rates in turns)[scale.turns // 2]
    print(f"prepare / tokenizer alone, {cores} cores, median of {scale.turns} turns: {ratio:.2f}", end="")
    print(" (without the second that a run takes with nothing to do)")
    return {
        "tokens": tokens,
        "units": UNITS_PER_CORE * cores,
        "turns": turns,
        "ratio": ratio,
    }


def run(config: PrepareConfig, source: Path, output: Path) -> dict:
    given, where = [str(source)], str(output)
    return prepare(config, inputs=given, output=where, cluster=ClusterConfig(), progress=False)


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


def measure_workers(texts: list[str], tokenizer: str, cores: int, folder: Path, scale: Scale) -> list[dict]:
    config = PrepareConfig(
        row_length=1024,
        tokenizer=tokenizer,
        read=ReadConfig(filters=("web",)),
        dedup=DedupConfig(rows_per_task=ROWS_PER_TASK),
        unit_bytes=4 * MIB,
        rows_per_shard=1024,
    )
    rows = []
    for times in scale.times:
        source = folder / f"x{times}"
        for copy in range(times * COPIES):
            write_parts(source, texts, 4, copy)
        size = sum(file.stat().st_size for file in source.iterdir())
        with connect(ClusterConfig(num_cpus=cores), folder / "logs"), Watch() as watch:
            begin = time.time()
            counts = run(config, source, folder / f"x{times}-out")["counts"]
        rows.append(
            {
                "times": times,
                "documents_kept": counts["documents_kept"],
                "megabytes": size / 1e6,
                "seconds": time.time() - begin,
                "worker_mib": watch.worker / MIB,
                "driver_mib": watch.driver / MIB,
            }
        )
        print(
            "{times:3d} x text {megabytes:7.1f} MB, {documents_kept:7,d} documents kept: worker {worker_mib:6.0f} MiB, driver {driver_mib:6.0f} MiB".format(
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
        snapshot = Snapshot(folder, 0)
        plan = write_plan(snapshot.plan_url, files, 64 * MIB)
        assert plan is not None
        job = Job(PrepareConfig(), snapshot, plan).packing("")
        report = Report(
            "",
            UNITS_PER_GROUP,
            64 * MIB,
            {"en": {"kept": [10**6, 10**9], "gopher_quality.few_words": [1, 1]}},
        )
        for group in range(plan.groups):
            shards = [
                ShardEntry(
                    "train",
                    f"train/{unit.name()}-000.safetensors",
                    4096,
                    9000,
                    16 << 20,
                    1 << 26,
                    f"{group:064x}",
                )
                for unit in plan.group(group)
            ]
            write_list(snapshot.group_url(group, "shards"), shards)
            write_list(snapshot.group_url(group, "reports"), [report])
        before = psutil.Process().memory_full_info().uss
        with connect(ClusterConfig(num_cpus=os.cpu_count()), f"{folder}/logs"), Watch() as watch:
            begin = time.time()
            assert sum(result for _, result in map_tasks(nothing, range(units), ClusterConfig())) == units
            seconds = time.time() - begin
            seen = SeenFiles([plan])
            assert all(seen.is_known("", part.file) for part in plan.unit(units - 1).parts)
            config = DedupConfig()
            dedup = plan_dedup("documents", units, units * 100_000, config.partitions)
            urls = KeysUrls(job, "documents")
            deduplicate(
                urls,
                f"{folder}/dedup",
                dedup,
                config,
                map_tasks=lambda task, numbers: map(nothing, numbers[:0]),
            )
            total = Report()
            for group in range(plan.groups):
                total = merge([total, *group_reports(job, group)])
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


def measure_driver(counts: Iterable[int]) -> list[dict]:
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
    data = HERE.parents[2] / "shared" / "data"
    parser.add_argument("--text", default=data / "text" / "c4_200.jsonl.gz")
    parser.add_argument("--tokenizer", default=data / "tokenizers" / "gpt-neox-olmo-dolma-v1_5")
    parser.add_argument("--only", choices=("speed", "workers", "driver"), nargs="+")
    parser.add_argument("--units", type=int, nargs="+", help="for the memory of the driver")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--drive", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        drive(arguments.drive)
        return
    scale = QUICK if arguments.quick else Scale()
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

    machine = {"cpu": cpu, "cores": arguments.cores, "python": platform.python_version(), "commit": commit}
    versions = {"ray": ray.__version__, "tokenizers": tokenizers.__version__}
    path = arguments.results / "prepare_scale.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(path.read_text()) if arguments.only and path.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, tokenizer, cores = Path(temporary), str(arguments.tokenizer), arguments.cores
        parts = {
            "speed": lambda: measure_speed(texts, tokenizer, cores, folder, scale),
            "workers": lambda: measure_workers(texts[:4000], tokenizer, cores, folder, scale),
            "driver": lambda: measure_driver(arguments.units or scale.units),
        }
        for name in arguments.only or parts:
            result[name] = {"machine": machine, "versions": versions, "measured": parts[name]()}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
