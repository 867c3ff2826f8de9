import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from llada.data.dedup.exchange import (
    choose_partitions,
    find_sorted,
    hash_partition,
    part_url,
    read_partition,
    read_slices,
    run_step,
    sort_rows,
    unique_rows,
    write_exchange,
)
from llada.mixing import mix64


@pytest.fixture(params=["local", "memory"])
def url(request, tmp_path):
    yield str(tmp_path / "data") if request.param == "local" else "memory://exchange-test"
    fsspec.filesystem("memory").store.clear()


def random_rows(count: int, columns: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 64, (count, columns), dtype=np.uint64)


def write_hashed(url: str, rows: np.ndarray, partitions: int, **settings) -> None:
    write_exchange(url, rows, hash_partition(rows[:, 0], partitions), partitions, **settings)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), max_size=30))
def test_rows_sort_like_tuples(rows):
    array = np.array(rows, dtype=np.uint64).reshape(-1, 3)
    assert [tuple(row) for row in sort_rows(array).tolist()] == sorted(rows)
    assert [tuple(row) for row in unique_rows(array).tolist()] == sorted(set(rows))


def test_the_file_is_plain_safetensors_sorted_by_partition(tmp_path):
    rows = np.array([[9, 1], [3, 7], [3, 2], [5, 5]], dtype=np.uint64)
    write_exchange(str(tmp_path / "a.safetensors"), rows, np.array([0, 1, 1, 3]), 4)
    stored = load_file(tmp_path / "a.safetensors")
    assert stored["rows"].tolist() == [[9, 1], [3, 2], [3, 7], [5, 5]]
    assert stored["offsets"].tolist() == [0, 1, 3, 3, 4]


def test_bytes_do_not_depend_on_the_order_of_the_rows(tmp_path):
    rows = random_rows(1000) % np.uint64(50)
    partition = mix64(rows[:, 1]) % np.uint64(7)
    shuffled = np.random.default_rng(1).permutation(1000)
    write_exchange(str(tmp_path / "a"), rows, partition, 7)
    write_exchange(str(tmp_path / "b"), rows[shuffled], partition[shuffled], 7)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("partitions", [1, 8, 1024])  # the offsets of 1024 lie behind the first request
def test_every_row_is_in_its_partition_of_every_division(url, partitions):
    rows = [random_rows(count, seed=count) for count in (300, 0, 5)]
    urls = [part_url(url, number) for number in range(3)]
    for file, part in zip(urls, rows, strict=True):
        write_hashed(file, part, partitions)
    for coarser in (1, 2, 8):
        if partitions % coarser:
            continue
        found = [read_partition(urls, partition, coarser) for partition in range(coarser)]
        for partition, part in enumerate(found):
            assert (part[:, 0] >> np.uint64(61) == partition * 8 // coarser).all() or coarser < 8
            assert (hash_partition(part[:, 0], coarser) == partition).all()
        assert (sort_rows(np.concatenate(found)) == sort_rows(np.concatenate(rows))).all()
    assert [len(part) for part in read_slices(urls, 0, 1)] == [300, 0, 5]


def test_a_file_may_hold_a_range_of_the_partitions(url):
    rows = random_rows(100)
    upper = rows[hash_partition(rows[:, 0], 8) >= 4]
    write_hashed(part_url(url, 0), upper, 8, first=4, count=4)
    assert (read_partition([part_url(url, 0)], 1, 2) == sort_rows(upper)).all()
    five = upper[hash_partition(upper[:, 0], 8) == 5]
    assert len(five)
    assert (read_partition([part_url(url, 0)], 5, 8) == sort_rows(five)).all()
    with pytest.raises(ValueError, match=r"000000.safetensors does not hold partition 3 of 8"):
        read_partition([part_url(url, 0)], 3, 8)
    with pytest.raises(ValueError, match=r"partitions \d..\d are outside 4..7"):
        write_hashed(part_url(url, 1), rows, 8, first=4, count=4)


def test_wrong_files_are_named(tmp_path):
    good = str(tmp_path / "good")
    write_hashed(good, random_rows(10), 2)
    with pytest.raises(
        ValueError, match=r"good does not hold partition 0 of 4: it was written with 2; delete"
    ):
        read_partition([good], 0, 4)
    (tmp_path / "cut").write_bytes((tmp_path / "good").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"cut is shorter than its header says; delete"):
        read_partition([str(tmp_path / "cut")], 0, 1)
    (tmp_path / "other").write_bytes(b"no exchange file")
    with pytest.raises(ValueError, match=r"other is no llada-exchange-1 file or is damaged; delete"):
        read_partition([str(tmp_path / "other")], 0, 1)
    with pytest.raises(ValueError, match=r"missing exchange file .*absent.*; delete"):
        read_partition([str(tmp_path / "absent")], 0, 1)


def test_partition_numbers():
    hashes = np.array([0, (1 << 63) - 1, 1 << 63, (1 << 64) - 1], dtype=np.uint64)
    assert hash_partition(hashes, 1).tolist() == [0, 0, 0, 0]
    assert hash_partition(hashes, 2).tolist() == [0, 0, 1, 1]
    assert hash_partition(hashes, 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="partitions must be a power of two"):
        hash_partition(hashes, 6)
    assert [choose_partitions(n, 100) for n in (0, 1, 100, 101, 200, 201, 900)] == [1, 1, 1, 2, 2, 4, 16]


def test_find_sorted():
    place, known = find_sorted(np.array([2, 5, 9], np.uint64), np.array([5, 1, 9, 10], np.uint64))
    assert known.tolist() == [True, False, True, False]
    assert place[known].tolist() == [1, 2]
    assert not find_sorted(np.empty(0, np.uint64), np.array([1], np.uint64))[1].any()


def test_a_step_runs_once(url):
    ran = []

    def task(number):
        ran.append(number)
        return number

    assert run_step(url, task, range(4), map) == 6
    assert run_step(url, task, range(4), map) == 6
    assert ran == [0, 1, 2, 3]


def test_a_step_that_failed_goes_on_with_what_is_missing(url):
    ran: list[int] = []

    def task(number: int) -> int:
        ran.append(number)
        return 10 // (number - 2 if len(ran) < 4 else 1)

    with pytest.raises(ZeroDivisionError):
        run_step(url, task, range(4), map)
    assert run_step(url, task, range(4), map) == -5 - 10 + 10 + 10
    assert run_step(url, task, range(4), map) == 5
    assert ran == [0, 1, 2, 2, 3]


@pytest.mark.integration
def test_ranges_of_an_object_store(s3_url):
    """Empty files, empty partitions and heads longer than the file, by real range requests."""
    rows = [random_rows(count, seed=count) for count in (0, 3, 2000)]
    urls = [part_url(f"{s3_url}/exchange", number) for number in range(3)]
    for url, part in zip(urls, rows, strict=True):
        write_hashed(url, part, 1024)
    whole = np.concatenate([read_partition(urls, partition, 256) for partition in range(0, 256, 51)])
    chosen = [part[hash_partition(part[:, 0], 256) % 51 == 0] for part in rows]
    assert len(whole) > 5
    assert (sort_rows(whole) == sort_rows(np.concatenate(chosen))).all()
    with pytest.raises(ValueError, match="missing exchange file"):
        read_partition([part_url(f"{s3_url}/exchange", 9)], 0, 1)
