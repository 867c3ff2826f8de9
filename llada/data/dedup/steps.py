"""Global deduplication of documents and of lines: plain functions over files, each one task of a distributed run.

A corpus is a sequence of work units; a document's place in it decides which duplicate stays: the first. Rows are
uint64. Steps, each with a barrier behind it (`run_step`), no step with a single task:
    1  document_rows / line_rows   per unit: (key, position[, line]) -> `write_unit_rows`; needs nothing but the unit
    2  combine       per group of units and range of keys: positions become document ids; repeats inside the group go
    3  link          per key partition: repeats in the whole corpus and in earlier snapshots; writes this one's index
    4  connected_components (documents only): documents that share a key belong together, directly or not
    5  gather        per group of units: what is to be removed, one byte range per unit -> `read_removals`
    6  summarise     per partition of the documents that stay: the clusters' sizes (documents only) -> clusters.py
`deduplicate` runs 2 to 6 with any `map_tasks`. Keys of a document: the hash of its text and its MinHash bands.

Document ids are unit << 32 | position + 1. Id 0 stands for all documents of earlier snapshots: the smallest node of
the graph, so whatever is connected to it goes. An index holds every key of its snapshot, also those of removed
documents; therefore a snapshot deduplicated against the indexes before it keeps what one run over it and all before
it would keep of it. (Of earlier ones such a run may keep less: a new document can link two that were kept.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from llada.data.dedup.clusters import summarise, tally
from llada.data.dedup.components import Graph, connected_components, write_edges
from llada.data.dedup.exchange import (
    MapTasks,
    choose_partitions,
    find_sorted,
    hash_partition,
    part_url,
    part_urls,
    read_partition,
    read_slices,
    run_starts,
    run_step,
    sort_rows,
    write_exchange,
)
from llada.data.dedup.minhash import MinHasher
from llada.errors import UserError
from llada.files import exists, join, read_bytes, write_bytes
from llada.settings import check_limits, limited, require

Kind = Literal["documents", "lines"]
UNIT_PARTITIONS = 256  # of a unit's rows: how finely a combine step can cut the key space
_POSITION_BITS = np.uint64(32)


@dataclass(frozen=True)
class DedupConfig:
    """Which duplicates are removed. The defaults of the MinHash are FineWeb's."""

    exact: bool = True
    """Documents with the same text, differences in white space aside."""
    fuzzy: bool = True
    """Documents that share a MinHash band: of Jaccard similarity 0.8 or more of the word n-grams 92 % or more."""
    ngram: int = limited(5, low=1)
    """Words in a row that are compared; shorter documents have only exact duplicates."""
    bands: int = limited(14, low=1)
    """Keys of a document: more make the match looser."""
    rows: int = limited(8, low=1)
    """Hashes in a band: more make the match stricter."""
    seed: int = limited(1, low=0)
    """Changes the hashes, and with them which near-duplicates are found by chance."""
    lines: bool = False
    """Lines that stand in the corpus before, in any document. (Of a document that is left shorter than `read.min_chars`
    nothing stays; keep that below `min_line_chars`, or a line may go with the document that held it for the others.)"""
    min_line_chars: int = limited(100, low=1)
    """Shorter lines are always kept: headings, refrains and code repeat for a reason."""
    rows_per_task: int = limited(1 << 24, low=1)
    """Rows that a task sorts, on average: 256 MB of two columns, about 1 GB while they are sorted."""
    partitions: int | None = limited(None, low=1)
    """Of the key space and of the graph, a power of two; None gives `rows_per_task` rows to each."""

    def __post_init__(self) -> None:
        check_limits(self, "dedup")
        require(
            self.partitions is None or self.partitions & (self.partitions - 1) == 0,
            f"dedup: partitions must be a power of two, not {self.partitions}",
        )

    def key_settings(self, kind: Kind) -> dict[str, Any]:
        """The settings that decide the keys: an index with others cannot be compared with."""
        if kind == "lines":
            return {"min_line_chars": self.min_line_chars}
        minhash = (
            {name: getattr(self, name) for name in ("ngram", "bands", "rows", "seed")} if self.fuzzy else None
        )
        return {"exact": self.exact, "minhash": minhash}


@dataclass(frozen=True)
class Index:
    """The keys of an earlier snapshot; `open_index` checks that they can be compared."""

    url: str
    partitions: int


@dataclass(frozen=True)
class DedupPlan:
    """How one deduplication is divided into tasks. `groups` x `ranges` combine, `partitions` link, `groups` gather."""

    kind: Kind
    units: int
    units_per_group: int
    ranges: int
    partitions: int

    @property
    def groups(self) -> int:
        return -(-self.units // self.units_per_group)


def units_per_group(units: int) -> int:
    """Work units in a group: 256 or, when that is more, the square root of all. A combine task and a link task of a
    million units read a thousand files each."""
    if units < 1:
        raise ValueError("nothing to deduplicate: there are no work units")
    return max(math.isqrt(units - 1) + 1, min(units, UNIT_PARTITIONS))


def plan_dedup(
    kind: Kind,
    units: int,
    rows: int,
    partitions: int | None = None,
    *,
    largest_group: int | None = None,
    rows_per_task: int = DedupConfig.rows_per_task,
) -> DedupPlan:
    """Tasks of about `rows_per_task` rows for `rows` rows of `units` units, of which `largest_group` stand in one group
    (the average by default): sources differ in the length of their documents, and so groups in their rows."""
    group = units_per_group(units)
    partitions = choose_partitions(rows, rows_per_task) if partitions is None else partitions
    largest_group = -(-rows * group // units) if largest_group is None else largest_group
    ranges = min(choose_partitions(largest_group, rows_per_task), partitions, UNIT_PARTITIONS)
    return DedupPlan(kind, units, group, ranges, partitions)


def document_rows(texts: Sequence[str], config: DedupConfig, hasher: MinHasher | None = None) -> np.ndarray:
    """Rows (key, position) uint64 (n, 2) of a unit's documents in order. A `hasher` of the same settings may be kept
    between calls: it remembers the hashes of words."""
    positions = np.arange(len(texts), dtype=np.uint64)
    rows = [np.empty((0, 2), dtype=np.uint64)]
    if config.exact:
        hashes = [_hash64(" ".join(text.split()), b"document") for text in texts]
        rows.append(np.column_stack([np.array(hashes, dtype=np.uint64), positions]))
    if config.fuzzy:
        hasher = hasher or MinHasher(config.ngram, config.bands, config.rows, config.seed)
        signatures, places = hasher.signatures(texts)
        keys = hasher.band_keys(signatures)
        rows.append(np.column_stack([keys.ravel(), np.repeat(positions[places], config.bands)]))
    return np.concatenate(rows)


def line_rows(
    texts: Sequence[str], config: DedupConfig, positions: Sequence[int] | None = None
) -> np.ndarray:
    """Rows (key, position, line number) uint64 (n, 3) of the lines that are long enough. `positions` are the
    documents' places in the unit when some are left out: those removed as duplicates must be, else a line could be
    removed for the sake of a document that goes too."""
    rows = []
    for position, text in zip(range(len(texts)) if positions is None else positions, texts, strict=True):
        for number, line in enumerate(text.split("\n")):
            normalised = " ".join(line.split())
            if len(normalised) >= config.min_line_chars:
                rows.append((_hash64(normalised, b"line"), position, number))
    return np.array(rows, dtype=np.uint64).reshape(-1, 3)


def remove_lines(text: str, numbers: np.ndarray) -> str:
    """The text without the lines of those numbers."""
    removed = set(numbers.tolist())
    return "\n".join(line for number, line in enumerate(text.split("\n")) if number not in removed)


def write_unit_rows(url: str, rows: np.ndarray) -> int:
    """Write what `document_rows` or `line_rows` gave for one unit; returns how many rows. A pure function of the unit:
    its place in the corpus is added later."""
    return write_exchange(url, rows, hash_partition(rows[:, 0], UNIT_PARTITIONS), UNIT_PARTITIONS)


def deduplicate(
    unit_urls: Sequence[str],
    folder: str,
    plan: DedupPlan,
    config: DedupConfig,
    *,
    earlier: Sequence[Index] = (),
    map_tasks: MapTasks = map,
) -> int:
    """Find what is to be removed from each unit, for `read_removals(folder, plan, unit)`, and write the snapshot's
    index to `folder`/index. Returns the number of documents (or lines) to remove.

    `unit_urls`: what `write_unit_rows` wrote, in corpus order. Steps that are complete in `folder` are not run again,
    so its URL must name the units, the settings and the earlier snapshots (by a hash of them).
    """
    if len(unit_urls) != plan.units:
        raise ValueError(
            f"{folder}: the plan is for {plan.units} units, not {len(unit_urls)}; make it with plan_dedup"
        )
    _check_settings(join(folder, "plan.json"), {**asdict(plan), "keys": config.key_settings(plan.kind)})
    for group in range(plan.groups):
        begin = group * plan.units_per_group
        urls = list(unit_urls[begin : begin + plan.units_per_group])
        write_bytes(_group_url(folder, group), json.dumps(urls).encode())
    cells = plan.groups * plan.ranges
    repeats = run_step(join(folder, "combined"), partial(combine, folder, plan), range(cells), map_tasks)
    task = partial(link, folder, plan, tuple(earlier))
    repeats += run_step(join(folder, "linked"), task, range(plan.partitions), map_tasks)
    _write_index_info(join(folder, "index"), plan, config)
    source, files = join(folder, "repeats"), cells + plan.partitions
    if plan.kind == "documents":
        enough = choose_partitions(repeats, config.rows_per_task)
        partitions = plan.partitions if config.partitions else min(plan.partitions, enough)
        graph = Graph(source, files, partitions, plan.units_per_group << 32, plan.groups)
        source, files = connected_components(graph, join(folder, "components"), map_tasks), partitions
    gathering = partial(gather, folder, plan, source, files)
    removed = run_step(join(folder, "removals"), gathering, range(plan.groups), map_tasks)
    if plan.kind == "documents":
        summing = partial(summarise, folder, plan.groups, files)
        run_step(join(folder, "clusters"), summing, range(files), map_tasks)
    return removed


def combine(folder: str, plan: DedupPlan, cell: int) -> int:
    """Step 2, task `cell` of ranges x groups: one range of the keys of one group of units. Of each key the first row
    goes on, so that a key of millions of documents costs the next step one row per group. Returns the repeats."""
    key_range, group = divmod(cell, plan.groups)
    slices = read_slices(json.loads(read_bytes(_group_url(folder, group))), key_range, plan.ranges)
    units = np.arange(len(slices), dtype=np.uint64) + np.uint64(group * plan.units_per_group)
    rows = np.concatenate(slices)
    rows[:, 1] = document_ids(np.repeat(units, [len(part) for part in slices]), rows[:, 1])
    rows = sort_rows(rows)
    first = run_starts(rows[:, 0])
    firsts, count = rows[first], plan.partitions // plan.ranges
    url = part_url(join(folder, "combined"), cell)
    partition = hash_partition(firsts[:, 0], plan.partitions)
    write_exchange(url, firsts, partition, plan.partitions, first=key_range * count, count=count)
    roots = firsts[np.cumsum(first) - 1, 1]
    return _write_repeats(folder, plan, cell, rows[~first], roots[~first])


def link(folder: str, plan: DedupPlan, earlier: Sequence[Index], partition: int) -> int:
    """Step 3, task `partition`: what repeats in the whole corpus or stood in an earlier snapshot; returns how many.
    Writes this partition of the index."""
    key_range = partition * plan.ranges // plan.partitions
    cells = range(key_range * plan.groups, (key_range + 1) * plan.groups)
    urls = [part_url(join(folder, "combined"), cell) for cell in cells]
    rows = sort_rows(read_partition(urls, partition, plan.partitions))
    first = run_starts(rows[:, 0])
    keys, run = rows[first, 0], np.cumsum(first) - 1
    is_old = np.zeros(len(keys), dtype=bool)
    for index in earlier:
        is_old |= find_sorted(_read_index(index, partition, plan.partitions), keys)[1]
    roots = np.where(is_old, np.uint64(0), rows[first, 1])[run]
    write_exchange(part_url(join(folder, "index"), partition), keys[:, None], np.zeros_like(keys), 1)
    repeats = ~first | is_old[run]
    return _write_repeats(folder, plan, plan.groups * plan.ranges + partition, rows[repeats], roots[repeats])


def gather(folder: str, plan: DedupPlan, source: str, files: int, group: int) -> int:
    """Step 5, task `group`: the removals of a group of units from all files of a step, unit by unit; returns them."""
    rows = read_partition(part_urls(source, files), group, plan.groups)
    if plan.kind == "documents":
        tally(folder, group, rows, files)
    unit = (rows[:, 0] >> _POSITION_BITS) - np.uint64(group * plan.units_per_group)
    return write_exchange(part_url(join(folder, "removals"), group), rows, unit, plan.units_per_group)


def read_removals(folder: str, plan: DedupPlan, unit: int) -> tuple[np.ndarray, np.ndarray]:
    """What to remove from a unit, in order: (positions int64 (n,), details uint64 (n,)).

    The detail of a document is the id of the one that stays for it (see `locate`), 0 when that is in an earlier
    snapshot; with kind "lines" it is the number of a line to remove from the document at that position.
    """
    group, place = divmod(unit, plan.units_per_group)
    rows = read_partition([part_url(join(folder, "removals"), group)], place, plan.units_per_group)
    return locate(rows[:, 0])[1], rows[:, 1]


def document_ids(units: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """uint64 ids of documents; in corpus order, never 0."""
    return (units << _POSITION_BITS) + positions + np.uint64(1)


def locate(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(units, positions), int64, of document ids that are not 0."""
    places = ids - np.uint64(1)
    return (places >> _POSITION_BITS).astype(np.int64), (places & np.uint64(0xFFFFFFFF)).astype(np.int64)


def open_index(url: str, kind: Kind, config: DedupConfig) -> Index:
    """The index at `url`. Raises UserError when there is none or its keys were made with other settings."""
    try:
        info = json.loads(read_bytes(join(url, "index.json")))
    except FileNotFoundError:
        raise UserError(
            f"no deduplication index at {url}; give the index folder of a finished snapshot"
        ) from None
    keys = config.key_settings(kind)
    if (info["kind"], info["keys"]) != (kind, keys):
        raise UserError(
            f"{url} is an index of {info['kind']} with {info['keys']}, not of {kind} with {keys}; use its settings"
        )
    return Index(url, info["partitions"])


def _check_settings(url: str, settings: dict[str, Any]) -> None:
    """Note what the folder is made with; half of another run's files in it would make no sense."""
    if exists(url) and json.loads(read_bytes(url)) != settings:
        raise UserError(
            f"{url} is of a run with other settings or units; give another folder or delete this one"
        )
    write_bytes(url, json.dumps(settings).encode())


def _write_index_info(url: str, plan: DedupPlan, config: DedupConfig) -> None:
    info = {"kind": plan.kind, "keys": config.key_settings(plan.kind), "partitions": plan.partitions}
    write_bytes(join(url, "index.json"), json.dumps(info).encode())


def _read_index(index: Index, partition: int, partitions: int) -> np.ndarray:
    """The sorted keys (n,) of one of `partitions` key partitions; the index may be divided more or less finely."""
    begin = partition * index.partitions // partitions
    files = range(begin, begin + max(1, index.partitions // partitions))
    keys = read_partition([part_url(index.url, file) for file in files], 0, 1)[:, 0]
    return keys[hash_partition(keys, partitions) == partition] if partitions > index.partitions else keys


def _write_repeats(folder: str, plan: DedupPlan, number: int, rows: np.ndarray, roots: np.ndarray) -> int:
    """Rows that repeat an earlier one: documents are edges (id, root), lines are removals (id, line) already."""
    url = part_url(join(folder, "repeats"), number)
    if plan.kind == "documents":
        edges = np.column_stack([rows[:, 1], roots])
        return write_edges(url, edges[edges[:, 0] != edges[:, 1]], plan.partitions)
    group = (rows[:, 1] >> _POSITION_BITS) // np.uint64(plan.units_per_group)
    return write_exchange(url, rows[:, 1:], group, plan.groups)


def _group_url(folder: str, group: int) -> str:
    return join(folder, "groups", f"{group:06d}.json")


def _hash64(text: str, purpose: bytes) -> int:
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=purpose).digest()
    return int.from_bytes(digest, "little")
