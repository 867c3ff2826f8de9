"""What travels from a worker as a value: what a person can mend, and what a file system has to say."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict

import pytest

from llada.errors import UserError
from pipelines.runners.failures import Failure, as_failure


def arrives(error: Exception) -> None:
    """Send a failure as the workers do, and raise it."""
    failure = as_failure(error)
    assert failure is not None
    Failure(**json.loads(json.dumps(asdict(failure)))).raise_again()


def test_a_user_error_arrives_as_it_was():
    with pytest.raises(UserError, match=r"^row 3 of a\.jsonl: mend it$"):
        arrives(UserError("row 3 of a.jsonl: mend it"))


def test_a_full_disk_keeps_its_number():
    with pytest.raises(OSError) as raised:
        arrives(OSError(errno.ENOSPC, "No space left on device"))
    assert raised.value.errno == errno.ENOSPC


def test_a_store_that_fails_says_what_to_do():
    with pytest.raises(
        UserError, match="a task failed: .*refused; what is finished is kept, run the command again"
    ):
        arrives(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"))


@pytest.mark.parametrize("error", [ValueError("shape"), KeyError("k"), ImportError("m"), AssertionError()])
def test_a_fault_of_ours_is_no_value(error):
    assert as_failure(error) is None


@pytest.mark.parametrize(
    "error", [FileExistsError(17, "File exists"), NotADirectoryError(20, "Not a directory")]
)
def test_a_file_in_the_way_is_the_users(error):
    with pytest.raises(UserError, match="a task failed: .*what is finished is kept"):
        arrives(error)
