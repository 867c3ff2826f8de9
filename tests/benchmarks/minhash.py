"""Deduplication: signatures per second beside datatrove's, recall by similarity, and the graph steps' speed and memory.

    python tests/benchmarks/minhash.py [--datatrove-python PATH] [--shared PATH] [--documents N] [--results FOLDER]

PATH is the python of another environment with `pip install "datatrove==0.10.*" spacy "xxhash<4" tokenizers`. Signatures:
both sides get the same real English pieces of about 2.2 kB, turn about, on one thread, three times; the best CPU time
counts, nothing is written. The graph steps run on synthetic keys of N, 4 N and 16 N documents (15 keys each, 30 % are
near copies of another), in a process each, with partitions of equal size: rate and memory should stay. Prints tables
and writes minhash.json. --quick takes little data, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
PIECE_CHARS = 2200
BUCKETS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DATATROVE = """
import importlib.metadata, json, sys, time
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
step = MinhashDedupSignature(sys.argv[2], MinhashConfig())
texts = json.load(open(sys.argv[1]))
def sign(text):
    shingles = step.get_shingles(text)
    return step.get_signature(shingles) if shingles.size else None
sign(texts[0])
start = time.process_time()
for text in texts:
    sign(text)
print(json.dumps({"seconds": time.process_time() - start, "version": importlib.metadata.version("datatrove")}))
"""


def real_pieces(shared: Path) -> list[str]:
    """English web pages, encyclopedia articles and novels, in pieces."""
    data = shared / "data" / "text"
    with gzip.open(data / "c4_200.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    texts += [json.loads(line)["text"] for line in (data / "wiki_demo.jsonl").open(encoding="utf-8")]
    texts += [path.read_text(encoding="utf-8-sig") for path in sorted((data / "novels").glob("*.txt"))[:3]]
    return [text[at : at + PIECE_CHARS] for text in texts for at in range(0, len(text), PIECE_CHARS)]


def compare_signatures(pieces: list[str], datatrove_python: str | None) -> dict:
    """Documents and MB (UTF-8) per second of CPU of both sides."""
    from llada.data.dedup.minhash import MinHasher

    megabytes = sum(len(piece.encode()) for piece in pieces) / 1e6
    ours, theirs, version = [], [], None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "pieces.json")
        file.write_text(json.dumps(pieces))
        for _ in range(3):
            start = time.process_time()
            hasher = MinHasher()  # nothing remembered
            hasher.band_keys(hasher.signatures(pieces)[0])
            ours.append(time.process_time() - start)
            if datatrove_python:
                command = [datatrove_python, "-c", DATATROVE, str(file), folder]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                result = json.loads(printed.splitlines()[-1])
                theirs.append(result["seconds"])
                version = result["version"]
    report = {"documents": len(pieces), "megabytes": megabytes, "datatrove_version": version}
    for name, seconds in (("llada", ours), ("datatrove", theirs)):
        if seconds:
            report[name] = {
                "documents_per_s": len(pieces) / min(seconds),
                "mb_per_s": megabytes / min(seconds),
            }
            print(f"signatures  {name:<10} {report[name]['documents_per_s']:9,.0f} documents/s/core ", end="")
            print(f"{report[name]['mb_per_s']:7.2f} MB/s/core")
    if theirs:
        report["speedup"] = min(theirs) / min(ours)
        print(f"signatures  {report['speedup']:.1f} times datatrove {version}")
    return report


def recall_by_similarity(pieces: list[str]) -> list[dict]:
    """Of pieces and copies with 0 to 16 % of the words changed: the share that meets in a band, by true Jaccard."""
    import numpy as np

    from llada.data.dedup.minhash import MinHasher, comparison_words

    rng = np.random.default_rng(0)
    chosen = [piece for piece in pieces if len(piece.split()) > 100][:2000]
    copies = []
    for number, piece in enumerate(chosen):
        words = piece.split(" ")
        for place in rng.choice(len(words), round(0.16 * number / len(chosen) * len(words)), replace=False):
            words[place] = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 9))
        copies.append(" ".join(words))

    def ngrams(text: str) -> set[tuple[str, ...]]:
        words = comparison_words(text)
        return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}

    sets = [(ngrams(a), ngrams(b)) for a, b in zip(chosen, copies, strict=True)]
    similarity = np.array([len(a & b) / len(a | b) for a, b in sets])
    hasher = MinHasher()
    keys = [hasher.band_keys(hasher.signatures(texts)[0]) for texts in (chosen, copies)]
    found = (keys[0] == keys[1]).any(axis=1)
    table = []
    print("similarity      pairs  found  expected")
    for low, high in pairwise(BUCKETS):
        inside = (similarity >= low) & ((similarity < high) | (high == 1.0))
        if not inside.any():
            continue
        expected = float(np.mean(1 - (1 - similarity[inside] ** hasher.rows) ** hasher.bands))
        row = {"from": low, "to": high, "pairs": int(inside.sum()), "found": float(found[inside].mean())}
        table.append(row | {"expected": expected})
        print(f"{low:.1f} .. {high:.1f} {row['pairs']:10} {row['found']:6.3f} {expected:9.3f}")
    high_found = found[similarity >= 0.8].mean()
    print(f"recall at similarity >= 0.8: {high_found:.3f}")
    return table


def run_graph(documents: int, partitions: int, folder: str) -> dict:
    """All steps after the keys, on synthetic ones; CPU seconds by step, peak memory of this process."""
    import numpy as np

    from llada.data.dedup.steps import DedupConfig, DedupPlan, deduplicate, write_unit_rows
    from llada.mixing import mix64

    per_unit = 2500
    units = documents // per_unit
    plan = DedupPlan("documents", units, min(units, 20), 1, partitions)
    urls = []
    for unit in range(units):
        number = np.arange(unit * per_unit, (unit + 1) * per_unit, dtype=np.uint64)[:, None]
        band = np.arange(15, dtype=np.uint64)
        is_copy = mix64(number) % np.uint64(10) < 3
        shares_key = is_copy & (mix64(number * np.uint64(16) + band) % np.uint64(10) < 4)
        original = mix64(number ^ np.uint64(1 << 40)) % np.maximum(number, np.uint64(1))
        keys = mix64(np.where(shares_key, original, number) * np.uint64(16) + band + np.uint64(1 << 60))
        positions = np.broadcast_to(np.arange(per_unit, dtype=np.uint64)[:, None], keys.shape)
        urls.append(f"{folder}/units/{unit:06d}.safetensors")
        write_unit_rows(urls[-1], np.column_stack([keys.ravel(), positions.ravel()]))
    steps: dict[str, float] = {}

    def timed(task, numbers):
        name = getattr(task, "func", task).__name__
        start = time.process_time()
        yield from map(task, numbers)
        steps[name] = steps.get(name, 0.0) + time.process_time() - start

    removed = deduplicate(urls, f"{folder}/work", plan, DedupConfig(partitions=partitions), map_tasks=timed)
    rounds = len(list(Path(folder, "work", "components").glob("round-*")))
    return {
        "documents": documents,
        "rows": documents * 15,
        "partitions": partitions,
        "removed": removed,
        "rounds": rounds,
        "cpu_seconds": steps,
        "rows_per_s_per_core": documents * 15 / sum(steps.values()),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measure_graph(documents: int) -> list[dict]:
    table = []
    print(
        "graph   documents        rows  partitions  rounds  removed  rows/s/core  documents/s/core  peak MB"
    )
    for scale in (1, 4, 16):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--graph", str(documents * scale), str(scale), folder]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = json.loads(printed.splitlines()[-1])
        table.append(row)
        rate = row["rows_per_s_per_core"]
        print(
            f"{row['documents']:17,} {row['rows']:11,} {scale:11} {row['rounds']:7} {row['removed']:8,}",
            end="",
        )
        print(f" {rate:12,.0f} {rate / 15:17,.0f} {row['peak_mb']:8.0f}")
    return table


def environment() -> dict:
    import numpy

    def output(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()

    models = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "git": output("git", "rev-parse", "HEAD"),
        "changed_files": len(output("git", "status", "--porcelain").splitlines()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datatrove-python")
    parser.add_argument("--shared", type=Path, default=HERE.parents[2] / "shared")
    parser.add_argument(
        "--documents", type=int, default=50_000, help="of the smallest graph; a multiple of 2,500"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--graph", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.graph:
        documents, partitions, folder = arguments.graph
        print(json.dumps(run_graph(int(documents), int(partitions), folder)))
        return
    pieces = real_pieces(arguments.shared)
    if arguments.quick:
        arguments.documents, pieces = 2500, pieces[::20]
    report = {
        "environment": environment(),
        "settings": {"documents": arguments.documents, "piece_chars": PIECE_CHARS},
    }
    report["signatures"] = compare_signatures(pieces, arguments.datatrove_python)
    report["recall"] = recall_by_similarity(pieces)
    report["graph"] = measure_graph(arguments.documents)
    target = arguments.results / "minhash.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
