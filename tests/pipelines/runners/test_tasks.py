"""Tasks on a real Ray: results as they come, one line for a user's error, a traceback for ours."""

from __future__ import annotations

import errno
import os
import traceback

import pytest

from llada.errors import UserError
from llada.files import storage_errors
from pipelines.runners.tasks import MAX_BLOCKS, map_tasks, num_blocks
from pipelines.stage.cluster import ClusterConfig, most_cpus
from pipelines.stage.command import exit_codes

pytestmark = pytest.mark.integration


def square(number: int) -> int:
    return number * number


def test_results_come_with_their_numbers(local_ray):
    assert dict(map_tasks(square, range(3, 12, 4), ClusterConfig())) == {3: 9, 7: 49, 11: 121}
    assert list(map_tasks(square, range(0), ClusterConfig())) == []


def test_each_worker_of_a_large_cluster_finds_blocks_and_the_driver_keeps_books_of_few():
    assert num_blocks(7, 10_000) == 7
    assert num_blocks(1_000_000, 2) == num_blocks(1_000_000, 1024) == 4096
    assert num_blocks(1_000_000, 10_000) == 40_000
    assert num_blocks(1_000_000, 1024.25) == 4097
    assert num_blocks(1_000_000, 1e6) == MAX_BLOCKS


def test_the_cpus_of_a_ray_are_counted(local_ray):
    assert most_cpus() == 2


def unequal_lengths(number: int) -> int:
    return len(list(zip([1], [1, 2], strict=True)))


def test_a_bug_in_a_task_shows_where_it_is(local_ray, capsys):
    """The remote traceback, down to the line of the task, and where it is kept."""
    with pytest.raises(SystemExit) as ended, exit_codes("prepare"), storage_errors("/tmp"):
        list(map_tasks(unequal_lengths, range(2), ClusterConfig()))
    err = capsys.readouterr().err
    assert ended.value.code == 1
    assert "in unequal_lengths" in err
    assert "zip() argument 2 is longer than argument 1" in err
    last = err.strip().splitlines()[-1]
    assert "llada prepare: a fault of ours or of the machine; its traceback is above and in " in last
    os.unlink(last.rsplit(" ", 1)[1])


def refuse(number: int) -> int:
    raise UserError("row 3 of a.jsonl: mend it")


def fill_the_disk(number: int) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_a_user_can_mend_is_one_line(local_ray, capsys):
    for function, line in (
        (refuse, "row 3 of a.jsonl: mend it"),
        (fill_the_disk, "no space left while writing s3://x/y: free some"),
    ):
        with pytest.raises(SystemExit), exit_codes("prepare"), storage_errors("s3://x/y"):
            list(map_tasks(function, range(2), ClusterConfig()))
        err = capsys.readouterr().err
        assert err.startswith(f"llada prepare: {line}")
        assert len(err.splitlines()) == 1


def test_a_bug_of_ours_is_not_a_users_error(local_ray):
    with pytest.raises(Exception, match="argument 2 is longer") as raised:
        list(map_tasks(unequal_lengths, range(2), ClusterConfig()))
    assert not isinstance(raised.value, UserError)
    assert "in unequal_lengths" in "".join(traceback.format_exception(raised.value))
