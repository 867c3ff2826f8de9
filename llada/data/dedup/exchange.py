"""The hand-over between the steps of a distributed computation on files: rows of uint64, split into partitions.

One file is one safetensors file:
    rows uint64 (n, C), sorted by partition and then column by column · offsets uint64 (partitions + 1,)
so a reader fetches one partition of a file as one byte range. A partition is chosen by the leading bits of a hash
(`hash_partition`), hence partitions nest: partition p of 4 is partitions 2p and 2p + 1 of 8, and a file that was
written with many can be read with fewer. A file may hold only some of the partitions (`first`, the rest is elsewhere).
A step writes a folder of such files, 000000.safetensors ..., and is complete when its `done.json` is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save

from llada.errors import UserError
from llada.files import exists, fetch_ranges, join, read_bytes, safetensors_layout, write_bytes

FORMAT = "llada-exchange-1"
_HEAD_BYTES = 8192  # the JSON header (about 250) and the offsets of up to 990 partitions in one request
_REMEDY = "delete the folder it is in and run the step that writes it again"

MapTasks = Callable[[Callable[[int], int], Sequence[int]], Iterable[int]]
"""Runs a function on task numbers, in any order, on any machine: `map` does it here."""


class _Place(NamedTuple):
    """Where the parts of a file lie, in bytes from its start."""

    rows: int
    offsets: int
    columns: int
    first: int
    """The first partition that the file holds."""
    number: int
    """How many it holds,"""
    partitions: int
    """of how many."""


def hash_partition(hashes: np.ndarray, num_partitions: int) -> np.ndarray:
    """The partition (n,) of uint64 hashes (n,): their leading bits. `num_partitions` is a power of two."""
    bits = num_partitions.bit_length() - 1
    if num_partitions != 1 << bits:
        raise ValueError(f"partitions must be a power of two (it is {num_partitions}); take {1 << bits}")
    return (hashes >> np.uint64(1)) >> np.uint64(63 - bits)  # twice: a shift by 64 is undefined


def choose_partitions(num_rows: int, rows_per_partition: int = 1 << 24) -> int:
    """The power of two that keeps partitions of `num_rows` hashed rows below `rows_per_partition` on average.

    A task that sorts 2^24 rows of two columns needs about 1 GB.
    """
    return 1 << max(0, -(-num_rows // rows_per_partition) - 1).bit_length()


def row_order(rows: np.ndarray) -> np.ndarray:
    """The order (n,) that sorts rows (n, C) by their columns, the first one counting most."""
    order = np.argsort(rows[:, 0])
    leading = rows[order, 0]
    equal = leading[1:] == leading[:-1]
    # The general sort is slow: only where the first column does not decide.
    if rows.shape[1] > 1 and equal.any():
        tied = np.flatnonzero(np.r_[equal, False] | np.r_[False, equal])
        undecided = order[tied]
        order[tied] = undecided[np.lexsort(rows[undecided].T[::-1])]
    return order


def sort_rows(rows: np.ndarray) -> np.ndarray:
    """Rows (n, C) in the order of their columns, the first one counting most."""
    return rows[row_order(rows)]


def unique_rows(rows: np.ndarray) -> np.ndarray:
    """The distinct rows of (n, C), sorted."""
    rows = sort_rows(rows)
    return rows[np.r_[True, (rows[1:] != rows[:-1]).any(axis=1)]] if len(rows) else rows


def run_starts(values: np.ndarray) -> np.ndarray:
    """Bool (n,): where a run of equal values begins, for sorted values (n,)."""
    return np.r_[True, values[1:] != values[:-1]] if len(values) else np.zeros(0, dtype=bool)


def find_sorted(values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(where each of `wanted` (m,) stands in the sorted `values` (n,), whether it does), each (m,)."""
    if not len(values):
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    place = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    return place, values[place] == wanted


def part_url(folder: str, number: int) -> str:
    """File `number` of a step's folder."""
    return join(folder, f"{number:06d}.safetensors")


def part_urls(folder: str, count: int) -> list[str]:
    """The first `count` files of a step's folder."""
    return [part_url(folder, number) for number in range(count)]


def run_step(folder: str, task: Callable[[int], int], numbers: Sequence[int], map_tasks: MapTasks) -> int:
    """The sum of `task(number)` over all numbers; neither a step that is complete nor a task of it is run again.

    Tasks write into `folder` and may be run any number of times. The folder's URL must name everything that the
    result depends on. `task` is picklable.
    """
    marker = join(folder, "done.json")
    if exists(marker):
        return json.loads(read_bytes(marker))["total"]
    total = sum(map_tasks(partial(run_once, join(folder, "done"), task), numbers))
    write_bytes(marker, json.dumps({"tasks": len(numbers), "total": total}).encode())
    return total


def run_once(folder: str, task: Callable[[int], int], number: int) -> int:
    """What `task(number)` returns, or returned when it was run before."""
    marker = join(folder, f"{number:06d}.json")
    try:
        return json.loads(read_bytes(marker))
    except FileNotFoundError:
        result = task(number)
    write_bytes(marker, json.dumps(result).encode())
    return result


def write_exchange(
    url: str,
    rows: np.ndarray,
    partition: np.ndarray,
    num_partitions: int,
    *,
    first: int = 0,
    count: int | None = None,
) -> int:
    """Write rows uint64 (n, C) with their partitions (n,), all or nothing; returns n. Same rows, same bytes.

    The file holds the partitions first .. first + count - 1 of `num_partitions`, all of them by default.
    """
    count = num_partitions if count is None else count
    if len(rows) and not first <= partition.min() <= partition.max() < first + count:
        raise ValueError(
            f"{url}: partitions {partition.min()}..{partition.max()} are outside {first}..{first + count - 1}"
        )
    order = row_order(rows)
    partition = partition[order].astype(np.min_scalar_type(num_partitions))  # up to 16 bits sort much faster
    by_partition = np.argsort(partition, kind="stable")
    order = order[by_partition]
    bounds = np.arange(first, first + count + 1).astype(partition.dtype)
    offsets = np.searchsorted(partition[by_partition], bounds)
    arrays = {"offsets": offsets.astype(np.uint64), "rows": np.ascontiguousarray(rows[order])}
    described = {"format": FORMAT, "first": first, "partitions": num_partitions}
    # one entry: safetensors writes several in a random order
    write_bytes(url, save(arrays, metadata={"exchange": json.dumps(described)}))
    return len(rows)


def read_partition(urls: Sequence[str], partition: int, num_partitions: int) -> np.ndarray:
    """The rows uint64 (n, C) of one partition of all files, one file's after the other. See `read_slices`."""
    return np.concatenate(read_slices(urls, partition, num_partitions))


def read_slices(urls: Sequence[str], partition: int, num_partitions: int) -> list[np.ndarray]:
    """The rows uint64 (n, C) of one partition, file by file. `num_partitions` divides what the files were written with.

    The byte ranges of all files are fetched together. Raises UserError naming a file that is missing or damaged.
    """
    heads = _fetch([(url, 0, _HEAD_BYTES) for url in urls])
    places = [_place(url, head) for url, head in zip(urls, heads, strict=True)]
    bounds = []
    for url, place in zip(urls, places, strict=True):
        finer, rest = divmod(place.partitions, num_partitions)
        begin = partition * finer - place.first
        if rest or begin < 0 or begin + finer > place.number:
            raise UserError(
                f"{url} does not hold partition {partition} of {num_partitions}: it was written with "
                f"{place.partitions}; {_REMEDY}"
            )
        bounds.append((begin, begin + finer))
    offsets = _offsets(urls, heads, places, bounds)
    ranges = [
        (url, place.rows + 8 * place.columns * start, place.rows + 8 * place.columns * end)
        for url, place, (start, end) in zip(urls, places, offsets, strict=True)
    ]
    slices = []
    for (url, start, end), place, data in zip(ranges, places, _fetch(ranges), strict=True):
        if len(data) != end - start:
            raise UserError(f"{url} is shorter than its header says; {_REMEDY}")
        slices.append(np.frombuffer(data, dtype="<u8").reshape(-1, place.columns))
    return slices


def _offsets(
    urls: Sequence[str], heads: Sequence[bytes], places: Sequence[_Place], bounds: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """(first row, end row) of the partitions (first, end) of each file; fetched where the head does not hold them."""
    wanted = [
        (place.offsets + 8 * number, file)
        for file, (place, bound) in enumerate(zip(places, bounds, strict=True))
        for number in bound
    ]
    missing = [(urls[file], start, start + 8) for start, file in wanted if start + 8 > len(heads[file])]
    fetched = iter(_fetch(missing))
    values = [
        int.from_bytes(
            heads[file][start : start + 8] if start + 8 <= len(heads[file]) else next(fetched), "little"
        )
        for start, file in wanted
    ]
    return list(zip(values[::2], values[1::2], strict=True))


def _place(url: str, head: bytes) -> _Place:
    try:
        metadata, arrays = safetensors_layout(head)
        described, rows, offsets = json.loads(metadata["exchange"]), arrays["rows"], arrays["offsets"]
        if described["format"] == FORMAT:
            return _Place(
                rows=rows.start,
                offsets=offsets.start,
                columns=rows.shape[1],
                first=described["first"],
                number=offsets.shape[0] - 1,
                partitions=described["partitions"],
            )
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{url} is no {FORMAT} file or is damaged; {_REMEDY}")


def _fetch(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    try:
        return fetch_ranges(ranges)
    except FileNotFoundError as error:
        raise UserError(f"missing exchange file {error}; {_REMEDY}") from None
