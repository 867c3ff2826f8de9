import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pytest

from llada.data.dedup.clusters import read_clusters
from llada.data.dedup.minhash import MinHasher, comparison_words
from llada.data.dedup.steps import (
    DedupConfig,
    DedupPlan,
    Index,
    deduplicate,
    document_ids,
    document_rows,
    line_rows,
    locate,
    open_index,
    plan_dedup,
    read_removals,
    remove_lines,
    write_unit_rows,
)
from llada.files import join

CONFIG = DedupConfig()
EXACT = DedupConfig(fuzzy=False)
LINES = DedupConfig(lines=True, min_line_chars=10)
Place = tuple[int, int]  # (unit, position)


def run(
    units: Sequence[Sequence[str]],
    folder: str | Path,
    config: DedupConfig = CONFIG,
    kind="documents",
    plan: DedupPlan | None = None,
    earlier: Sequence[Index] = (),
    map_tasks=map,
) -> dict[Place, list[tuple[int, ...]]]:
    """{place: details of its removals} of a corpus, through the files; a detail is the place of the one that stays
    (() when in an earlier snapshot), or (line number,)."""
    folder = str(folder)
    urls = [join(folder, "units", f"{number}.safetensors") for number in range(len(units))]
    hasher = MinHasher(config.ngram, config.bands, config.rows, config.seed)
    rows = 0
    for url, texts in zip(urls, units, strict=True):
        made = document_rows(texts, config, hasher) if kind == "documents" else line_rows(texts, config)
        rows += write_unit_rows(url, made)
    plan = plan or plan_dedup(kind, len(units), rows, config.partitions)
    removed = deduplicate(urls, folder, plan, config, earlier=earlier, map_tasks=map_tasks)
    found: dict[Place, list[tuple[int, ...]]] = {}
    for unit in range(len(units)):
        positions, details = read_removals(folder, plan, unit)
        assert (np.diff(positions) >= 0).all()
        for position, detail in zip(positions.tolist(), details, strict=True):
            stays = (int(detail),) if kind == "lines" else place_of(detail) if detail else ()
            found.setdefault((unit, position), []).append(stays)
    assert removed == sum(map(len, found.values()))
    return found


def place_of(document: np.uint64) -> Place:
    unit, position = locate(np.array([document]))
    return int(unit[0]), int(position[0])


def cut(texts: Sequence[str], size: int) -> list[list[str]]:
    return [list(texts[start : start + size]) for start in range(0, len(texts), size)]


def edited(text: str, share: float, rng: np.random.Generator) -> str:
    """The text with that share of its words exchanged for new ones."""
    words = text.split(" ")
    for place in rng.choice(len(words), round(share * len(words)), replace=False):
        words[place] = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 9))
    return " ".join(words)


def jaccard(a: str, b: str) -> float:
    """Of the sets of word 5-grams."""
    first, second = (
        {tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (comparison_words(a), comparison_words(b))
    )
    return len(first & second) / len(first | second)


@pytest.fixture(scope="module")
def pages(shared_dir) -> list[str]:
    with gzip.open(shared_dir / "data/text/c4_200.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def near_duplicates(pages) -> list[str]:
    """50 pages, each followed at random by two copies in which up to 4 % of the words differ."""
    rng = np.random.default_rng(0)
    copies = [edited(page, 0.04 * rng.random(), rng) for page in pages[:50] for _ in range(2)]
    return [*pages[:50], *(copies[number] for number in rng.permutation(len(copies)))]


def test_recall_and_precision_by_true_jaccard(pages, tmp_path):
    """Recall over planted pairs of known similarity, precision over every removal and the document that stays."""
    rng = np.random.default_rng(0)
    copies = [edited(page, 0.16 * number / len(pages), rng) for number, page in enumerate(pages)]
    removed = run([pages, copies], tmp_path)
    similarity = np.array([jaccard(page, copy) for page, copy in zip(pages, copies, strict=True)])
    found = np.array([(1, number) in removed for number in range(len(copies))])
    assert (similarity >= 0.8).sum() > 25
    assert found[similarity >= 0.8].mean() >= 0.9
    assert found[similarity < 0.45].mean() <= 0.1
    texts = [pages, copies]
    true = [jaccard(texts[u][p], texts[root[0]][root[1]]) for (u, p), [root] in removed.items()]
    assert np.mean(np.array(true) >= 0.5) >= 0.95
    assert min(true) > 0.2  # nothing unrelated


def test_natural_repeats_are_found_exactly(shared_dir, tmp_path):
    with gzip.open(shared_dir / "data/text/nsmc_20k.jsonl.gz", "rt", encoding="utf-8") as lines:
        reviews = [json.loads(line)["text"] for line in lines]
    removed = run(cut(reviews, 1000), tmp_path, EXACT)
    first = {text: number for number, text in reversed(list(enumerate(reviews)))}
    expected = {
        divmod(number, 1000): [divmod(first[text], 1000)]
        for number, text in enumerate(reviews)
        if first[text] != number
    }
    assert removed == expected
    assert len(removed) == 20_000 - 19_763


def test_chinese_near_duplicates(shared_dir, tmp_path):
    poems = [
        json.loads(line)["text"]
        for line in (shared_dir / "data/text/chinese_poems.jsonl").open(encoding="utf-8")
    ]
    poems = ["\n".join(poems[start : start + 6]) for start in range(0, 600, 6)]
    copies = [poem[:50] + "龘" + poem[51:] for poem in poems]
    removed = run([poems, copies], tmp_path)
    found = [removed.get((1, number)) == [(0, number)] for number in range(len(poems))]
    assert np.mean(found) >= 0.95
    assert sum(unit == 0 for unit, _ in removed) <= 2


def test_the_first_of_a_cluster_stays(tmp_path):
    text = "one two three four five six seven eight nine ten"
    units = [["alone", text], [], [text.upper(), "alone\n"], [text + "  ", "Alone", "", " "]]
    assert run(units, tmp_path / "both") == {
        (2, 0): [(0, 1)],
        (2, 1): [(0, 0)],
        (3, 0): [(0, 1)],
        (3, 3): [(3, 2)],
    }
    assert run(units, tmp_path / "exact", EXACT) == {(2, 1): [(0, 0)], (3, 0): [(0, 1)], (3, 3): [(3, 2)]}
    fuzzy = replace(CONFIG, exact=False)
    assert run(units, tmp_path / "fuzzy", fuzzy) == {(2, 0): [(0, 1)], (3, 0): [(0, 1)]}


def test_a_document_does_not_repeat_itself(tmp_path):
    """Two of its keys may be equal by chance."""
    url = str(tmp_path / "unit")
    write_unit_rows(url, np.array([[7, 0], [7, 0], [9, 1]], dtype=np.uint64))
    plan = plan_dedup("documents", 1, 3)
    assert deduplicate([url], str(tmp_path / "work"), plan, CONFIG) == 0


def test_nothing_to_remove(tmp_path):
    assert run([[], []], tmp_path / "empty") == {}
    assert run([["a b c d e f"], ["g h i j k l"]], tmp_path / "different") == {}


def plans(units: int) -> dict[str, DedupPlan]:
    return {
        "one task": DedupPlan("documents", units, units, 1, 1),
        "eight partitions": DedupPlan("documents", units, units, 1, 8),
        "groups of one unit": DedupPlan("documents", units, 1, 1, 8),
        "groups and ranges": DedupPlan("documents", units, 4, 8, 16),
    }


def test_clusters_are_what_shares_the_document_that_stays(near_duplicates, tmp_path):
    removed = run(cut(near_duplicates, 20), tmp_path)
    sizes = Counter(stays for [stays] in removed.values())
    found = read_clusters(str(tmp_path))
    assert found.number == len(sizes) > 30
    assert found.documents == len(sizes) + len(removed)
    assert found.largest[0].size == max(sizes.values()) + 1 == 3  # a page and its two copies
    for cluster in found.largest:
        stays, *went = (place_of(np.uint64(number)) for number in cluster.ids)
        assert all(removed[place] == [stays] for place in went)


def test_the_division_of_the_work_changes_nothing(near_duplicates, tmp_path):
    units = cut(near_duplicates, 13)
    results = [
        run(units, tmp_path / name, replace(CONFIG, partitions=plan.partitions), plan=plan)
        for name, plan in plans(len(units)).items()
    ]
    assert len(results[0]) > 60
    assert all(result == results[0] for result in results)


def test_a_rerun_and_another_order_of_tasks_write_the_same_bytes(near_duplicates, tmp_path):
    units = cut(near_duplicates, 20)
    plan = DedupPlan("documents", len(units), 3, 2, 8)

    def twice_backwards(task, numbers):
        return [task(number) for number in reversed(numbers) for _ in range(2)][::2]

    config = replace(CONFIG, partitions=8)
    run(units, tmp_path / "a", config, plan=plan)
    run(units, tmp_path / "b", config, plan=plan, map_tasks=twice_backwards)
    files = {p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.safetensors")}
    assert files == {p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*.safetensors")}
    assert len(files) > 50
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_run_that_is_killed_ends_the_same(near_duplicates, tmp_path):
    units = cut(near_duplicates, 20)
    plan = DedupPlan("documents", len(units), 3, 2, 8)
    config = replace(CONFIG, partitions=8)
    whole = run(units, tmp_path / "whole", config, plan=plan)
    left = [0]

    def dying(task, numbers):
        for number in numbers:
            left[0] -= 1
            if left[0] < 0:
                raise InterruptedError
            yield task(number)

    for attempt in range(200):
        left[0] = 9 + attempt % 3
        try:
            assert run(units, tmp_path / "killed", config, plan=plan, map_tasks=dying) == whole
            break
        except InterruptedError:
            pass
    else:
        pytest.fail("the run made no progress")
    assert attempt > 2


@pytest.mark.parametrize("partitions", [(1, 8), (8, 1), (4, 4)])
@pytest.mark.parametrize("kind", ["documents", "lines"])
def test_a_later_snapshot_keeps_what_one_run_would_keep(kind, partitions, near_duplicates, tmp_path):
    """Three snapshots in turn, each with the indexes of those before, against one run over all until then."""
    config = CONFIG if kind == "documents" else LINES
    texts = (
        near_duplicates
        if kind == "documents"
        else [line for t in near_duplicates[::3] for line in (t, t[:40])]
    )
    texts = [texts[number] for number in np.random.default_rng(5).permutation(len(texts))]
    units = cut(texts, 9)
    bounds = [0, 5, 9, len(units)]
    earlier: list[Index] = []
    for number, (begin, end) in enumerate(pairwise(bounds)):
        folder = tmp_path / f"snapshot{number}"
        chosen = replace(config, partitions=partitions[number % 2])
        found = run(units[begin:end], folder, chosen, kind, earlier=earlier)
        earlier.append(open_index(str(folder / "index"), kind, config))
        whole = run(units[:end], tmp_path / f"whole{number}", config, kind)
        expected = {place: details for place, details in whole.items() if place[0] >= begin}
        assert {(unit + begin, position) for unit, position in found} == expected.keys()
        for (unit, position), details in found.items():
            wanted = expected[unit + begin, position]
            if kind == "documents":  # a place in an earlier snapshot is not told
                wanted = [(root - begin, place) if root >= begin else () for root, place in wanted]
            assert details == wanted
    assert sum(map(len, found.values())) > 20


def test_index_of_other_settings_is_refused(tmp_path):
    run([["a b c d e f"]], tmp_path)
    url = str(tmp_path / "index")
    assert open_index(url, "documents", CONFIG) == Index(url, 1)
    with pytest.raises(
        ValueError, match=r"is an index of documents with .*'seed': 1.*not of documents with .*'seed': 2"
    ):
        open_index(url, "documents", replace(CONFIG, seed=2))
    with pytest.raises(ValueError, match=r"is an index of documents"):
        open_index(url, "lines", CONFIG)
    with pytest.raises(ValueError, match=r"no deduplication index at .*absent"):
        open_index(str(tmp_path / "absent"), "documents", CONFIG)


def test_lines(tmp_path):
    boiler = "Subscribe to our newsletter today"
    units = [
        [f"First text.\n{boiler}\nshort\nshort", f"  Subscribe to our  newsletter today \n{boiler}"],
        [f"{boiler}.\nAnother line that is long\nshort", f"Another line that is long\n{boiler}"],
    ]
    removed = run(units, tmp_path, LINES, "lines")
    assert removed == {(0, 1): [(0,), (1,)], (1, 1): [(0,), (1,)]}
    assert remove_lines(units[0][0], np.array([1, 2])) == "First text.\nshort"
    assert remove_lines(units[0][1], np.array([0, 1])) == ""
    assert line_rows(units[1], LINES, positions=[4, 9])[:, 1].tolist() == [4, 4, 9, 9]


def test_a_text_everyone_has_costs_a_row_per_group(tmp_path):
    """What stands in every document goes on once per group, and its removals are spread over the partitions."""
    units = [["the same text in every document of the corpus"] * 50 for _ in range(40)]
    plan = DedupPlan("documents", 40, 10, 1, 4)
    removed = run(units, tmp_path, replace(CONFIG, partitions=4), plan=plan)
    assert len(removed) == 40 * 50 - 1
    assert set(map(tuple, removed.values())) == {((0, 0),)}
    keys = [p.stat().st_size for p in (tmp_path / "combined").glob("*.safetensors")]
    assert len(keys) == 4
    assert max(keys) < 1000  # 15 rows of 16 bytes and the header
    stars = [p.stat().st_size for p in (tmp_path / "components").glob("round-*/stars/*.safetensors")]
    assert max(stars) < 1.5 * 16 * 2000 / 4 + 500


def test_any_file_system(near_duplicates, tmp_path):
    units = cut(near_duplicates[::2], 10)
    fsspec.filesystem("memory").store.clear()
    assert run(units, "memory://dedup-test") == run(units, tmp_path)
    fsspec.filesystem("memory").store.clear()


def test_ids_are_in_corpus_order_and_never_zero():
    units, positions = np.array([0, 0, 1, 999_999], np.uint64), np.array([0, 7, 0, 40_000], np.uint64)
    ids = document_ids(units, positions)
    assert ids.dtype == np.uint64
    assert ids[0] > 0
    assert (np.diff(ids.astype(np.int64)) > 0).all()
    assert [part.tolist() for part in locate(ids)] == [units.tolist(), positions.tolist()]


def test_a_group_with_more_rows_than_others_is_cut_finer():
    """100 groups of units, one of which has half of the rows."""
    rows, units = 1 << 32, 256 * 100
    plan = plan_dedup("documents", units, rows, largest_group=rows // 2)
    assert (rows // 2) // plan.ranges <= 1 << 24
    assert plan.ranges > plan_dedup("documents", units, rows).ranges


@pytest.mark.parametrize(
    "units, rows", [(1, 0), (3, 100), (100, 10**9), (10**6, 4 * 10**11), (10**5, 10**10)]
)
def test_plans_keep_tasks_small(units, rows):
    plan = plan_dedup("documents", units, rows)
    assert plan.groups * plan.units_per_group >= units > (plan.groups - 1) * plan.units_per_group
    assert plan.partitions % plan.ranges == 0
    assert 256 % plan.ranges == 0
    assert rows / plan.partitions <= 1 << 24
    assert rows / plan.groups / plan.ranges <= (1 << 24) * 1.1
    assert plan.groups <= 1000
    assert plan.units_per_group <= 1000


@pytest.mark.parametrize(
    "setting",
    [
        {"ngram": 0},
        {"bands": 0},
        {"rows": -1},
        {"seed": -1},
        {"min_line_chars": 0},
        {"partitions": 6},
        {"partitions": 0},
    ],
)
def test_settings_that_make_no_sense(setting):
    name, value = next(iter(setting.items()))
    with pytest.raises(ValueError, match=rf"dedup: {name} must be .*, not {value}"):
        DedupConfig(**setting)


def test_no_units_are_refused():
    with pytest.raises(ValueError, match="there are no work units"):
        plan_dedup("documents", 0, 0)


def test_a_plan_for_other_units_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the plan is for 3 units, not 2"):
        deduplicate(["a", "b"], str(tmp_path), plan_dedup("documents", 3, 10), CONFIG)


def test_a_folder_of_another_run_is_refused(tmp_path):
    units = [["a b c d e f"], ["a b c d e f"]]
    assert run(units, tmp_path) == run(units, tmp_path) == {(1, 0): [(0, 0)]}
    with pytest.raises(
        ValueError, match=r"plan.json is of a run with other settings or units; give another folder"
    ):
        run(units, tmp_path, EXACT)
