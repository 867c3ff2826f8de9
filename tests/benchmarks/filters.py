"""The four quality filters beside datatrove's: throughput of one core and agreement of the decisions.

    python tests/benchmarks/filters.py --datatrove-python PATH [--shared PATH] [--limit N] [--results FOLDER]

PATH is the python of another environment with `pip install "datatrove[processing]==0.10.*" spacy`. Both sides get the
same real English documents, cleaned as `llada prepare` cleans them, in the same order, one after the other, on one
thread. "chain" is FineWeb's order, ended by the first refusal: Gopher repetition, Gopher quality, C4 (which rewrites),
FineWeb. Ours starts with nothing remembered. Prints a table and the disagreements, each with the words that differ,
and writes filters.json. --quick takes some 100 documents, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILTERS = ("gopher_repetition", "gopher_quality", "c4_quality", "fineweb_quality")
STAGES = (*FILTERS, "chain")
PIECE_CHARS = 2500
RULES = {  # datatrove's names of the rules
    "gopher_short_doc": "few_words", "gopher_long_doc": "many_words", "gopher_below_avg_threshold": "short_words",
    "gopher_above_avg_threshold": "long_words", "gopher_too_many_hashes": "hashes",
    "gopher_too_many_ellipsis": "ellipses", "gopher_too_many_bullets": "bullet_lines",
    "gopher_too_many_end_ellipsis": "ellipsis_lines", "gopher_below_alpha_threshold": "words_without_letters",
    "gopher_enough_stop_words": "stop_words", "dup_para_frac": "duplicate_paragraphs",
    "dup_para_char_frac": "duplicate_paragraph_chars", "dup_line_frac": "duplicate_lines",
    "dup_line_char_frac": "duplicate_line_chars", "too_few_sentences": "few_sentences",
    "line_punct_ratio": "line_punctuation", "short_line_ratio": "short_lines",
    "char_dup_ratio": "duplicate_line_chars", "list_ratio": "newlines",
    **{f"duplicated_{n}_n_grams": f"duplicate_{n}_gram" for n in range(5, 11)},
}  # fmt: skip


def read_records(path: Path) -> Iterator[dict]:
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else open(path)  # noqa: SIM115
    with opened as file:
        yield from map(json.loads, file)


def cut(text: str) -> Iterator[str]:
    """Pieces of about PIECE_CHARS, ending at line breaks."""
    while len(text) > 1.5 * PIECE_CHARS:
        end = text.rfind("\n", PIECE_CHARS // 2, PIECE_CHARS)
        end = end if end > 0 else PIECE_CHARS
        yield text[:end]
        text = text[end:]
    yield text


def real_documents(shared: Path) -> Iterator[tuple[str, str]]:
    """(source, text): web pages good and bad, prose, stories, questions with answers, papers in LaTeX, code."""
    data = shared / "data"
    for name in (
        "text/c4_200.jsonl.gz",
        "web/cc_head/cc_en_head-0091.jsonl.gz",
        "web/cc_head/cc_en_head-0174.jsonl.gz",
        "web/mixer_pairs/documents.jsonl.gz",
        "web/quality_labels.jsonl",
    ):
        yield from (
            (name.split("/")[1].split(".")[0], record["text"]) for record in read_records(data / name)
        )
    for name in ("text/wiki_demo.jsonl", "text/arxiv_10.jsonl.gz"):
        for record in read_records(data / name):
            yield from ((Path(name).name.split(".")[0], piece) for piece in cut(record["text"]))
    stories = (data / "text/tinystories.txt").read_text().split("<|endoftext|>")
    yield from (("tinystories", story) for story in stories)
    for novel in sorted((data / "text/novels").glob("*.txt")):
        yield from (("novels", piece) for piece in cut(novel.read_text(encoding="utf-8-sig")))
    yield from (("shakespeare", piece) for piece in cut((data / "text/tinyshakespeare.txt").read_text()))
    yield from (("sft", record["response"]) for record in read_records(data / "sft/dolly_hhrlhf_1k.jsonl"))
    import pyarrow.parquet as parquet

    yield from (
        ("code", text)
        for text in parquet.read_table(data / "text/code/thealgorithms.parquet")["text"].to_pylist()
    )


def timed(decide: Callable[[str], str | None], texts: list[str]) -> dict:
    start = time.process_time()
    rules = [decide(text) for text in texts]
    return {"seconds": time.process_time() - start, "rules": rules}


def run_ours(texts: list[str]) -> dict[str, dict]:
    from llada.data.document import Document
    from llada.data.filters import words
    from llada.data.filters.chain import FilterChain, FilterSettings, chosen_filters

    def decide_with(names: tuple[str, ...]) -> Callable[[str], str | None]:
        chain = FilterChain(chosen_filters(names, FilterSettings()))

        def decide(text: str) -> str | None:
            verdict = chain(Document(text, language="en")).verdict
            return verdict and verdict.rule

        return decide

    names = {"gopher_repetition": "gopher_repetition", "gopher_quality": "gopher_quality",
             "c4_quality": "c4", "fineweb_quality": "fineweb"}  # fmt: skip
    chain = decide_with(tuple(names.values()))
    results = {}
    for stage in STAGES:
        words._PIECES.clear()
        words._remembered_record.cache_clear()
        results[stage] = timed(chain if stage == "chain" else decide_with((names[stage],)), texts)
    results["chain, words remembered"] = timed(chain, texts)
    return results


def run_datatrove(texts: list[str]) -> dict[str, dict]:
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    steps = {
        "gopher_repetition": GopherRepetitionFilter(),
        "gopher_quality": GopherQualityFilter(),
        "c4_quality": C4QualityFilter(filter_no_terminal_punct=False),
        "fineweb_quality": FineWebQualityFilter(),
    }

    def decide(name: str, document: Document) -> str | None:
        try:
            result = steps[name].filter(document)
        except ZeroDivisionError:  # a text without words
            return f"{name}.crash"
        if result is True:
            return None
        rule = result[1] if isinstance(result, tuple) else "refused"
        return f"{name}.{RULES.get(rule, rule)}"

    def chain(text: str) -> str | None:
        document = Document(text=text, id="")
        return next((rule for name in FILTERS if (rule := decide(name, document))), None)

    def alone(name: str) -> Callable[[str], str | None]:
        return lambda text: decide(name, Document(text=text, id=""))

    chain("The tokenizer is loaded on its first use. " * 20)
    return {name: timed(chain if name == "chain" else alone(name), texts) for name in STAGES}


def datatrove_side(task: str, source: str, target: str) -> None:
    """What the other environment's python runs: `task` is "decide" or "words"."""
    texts = json.loads(Path(source).read_text())
    if task == "decide":
        result: object = run_datatrove(texts)
    else:
        from datatrove.utils.text import split_into_words

        result = [split_into_words(text) for text in texts]
    Path(target).write_text(json.dumps(result))


def ask_datatrove(python: str, task: str, texts: list[str]) -> list | dict:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.json"), Path(folder, "out.json")
        source.write_text(json.dumps(texts))
        subprocess.run([python, __file__, "--as-datatrove", task, str(source), str(target)], check=True)
        return json.loads(target.read_text())


def different_words(text: str, theirs: list[str]) -> list[str]:
    """Where the two sides' words differ: "a b -> ab", datatrove's first."""
    from llada.data.filters.words import split_words

    ours = split_words(text)
    blocks = SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes()
    return [
        f"{' '.join(theirs[a:b])} -> {' '.join(ours[c:d])}" for tag, a, b, c, d in blocks if tag != "equal"
    ]


def machine() -> dict[str, object]:
    from importlib.metadata import version

    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datatrove-python", required=True)
    parser.add_argument("--shared", type=Path, default=HERE.parents[2] / "shared")
    parser.add_argument(
        "--limit", type=int, help="take only about this many documents, evenly from all sources"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.limit = 100
    from llada.data.read.cleaning import clean_text

    documents = [
        (source, text) for source, raw in real_documents(arguments.shared) if (text := clean_text(raw))
    ]
    if arguments.limit:
        documents = documents[:: max(1, len(documents) // arguments.limit)]
    texts = [text for _, text in documents]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts)} documents, {megabytes:.1f} MB:", dict(Counter(source for source, _ in documents)))
    ours = run_ours(texts)
    theirs = ask_datatrove(arguments.datatrove_python, "decide", texts)

    rows = []
    for name, result in ours.items():
        stage = name.split(",")[0]
        other = theirs[stage]
        same = sum((a is None) == (b is None) for a, b in zip(result["rules"], other["rules"], strict=True))
        same_rule = sum(a == b for a, b in zip(result["rules"], other["rules"], strict=True))
        rows.append(
            {
                "filter": name,
                "documents_per_second": round(len(texts) / result["seconds"]),
                "megabytes_per_second": round(megabytes / result["seconds"], 2),
                "datatrove_documents_per_second": round(len(texts) / other["seconds"], 1),
                "speedup": round(other["seconds"] / result["seconds"], 1),
                "kept": sum(rule is None for rule in result["rules"]),
                "equal_decisions": round(same / len(texts), 5),
                "equal_rules": round(same_rule / len(texts), 5),
            }
        )
    print("filter                    docs/s    MB/s   datatrove  speedup    kept  decisions  rules")
    for row in rows:
        print(
            f"{row['filter']:24s} {row['documents_per_second']:7d} {row['megabytes_per_second']:7.2f}"
            f" {row['datatrove_documents_per_second']:11.1f} {row['speedup']:7.1f}x {row['kept']:7d}"
            f" {row['equal_decisions']:10.2%} {row['equal_rules']:6.2%}"
        )

    differing = [
        (i, name, ours[name]["rules"][i], theirs[name]["rules"][i])
        for name in STAGES
        for i in range(len(texts))
        if ours[name]["rules"][i] != theirs[name]["rules"][i]
    ]
    words = ask_datatrove(arguments.datatrove_python, "words", [texts[i] for i, *_ in differing])
    disagreements = [
        {
            "document": f"{documents[i][0]} {i}",
            "filter": name,
            "ours": our_rule,
            "datatrove": their_rule,
            "words": different_words(texts[i], their_words)[:8],
        }
        for (i, name, our_rule, their_rule), their_words in zip(differing, words, strict=True)
    ]
    for disagreement in disagreements:
        print(*disagreement.values(), sep=" | ")
    by_source = {
        source: sum(
            rule is None
            for (s, _), rule in zip(documents, ours["chain"]["rules"], strict=True)
            if s == source
        )
        / count
        for source, count in Counter(source for source, _ in documents).items()
    }
    result = {
        "machine": machine(),
        "settings": {"documents": len(texts), "megabytes": megabytes, "threads": 1, "datatrove": "0.10"},
        "rows": rows,
        "kept_share_by_source": {source: round(share, 3) for source, share in by_source.items()},
        "refusals": dict(Counter(rule for rule in ours["chain"]["rules"] if rule).most_common()),
        "disagreements": disagreements,
    }
    target = arguments.results / "filters.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print("written:", target)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-datatrove"]:
        datatrove_side(*sys.argv[2:5])
    else:
        main()
