"""Failures that travel from Ray's workers to the driver as values: through Ray Data an exception keeps its text, but
loses its class and its number.

Only what a person can mend travels so: a UserError, a full disk, missing rights, a file in the way, and a remote store
that does not answer.
Every other exception is left to Ray, which brings its remote traceback to the terminal.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from llada.errors import UserError
from llada.store_errors import is_store_error, reason

_FULL = (errno.ENOSPC, errno.EDQUOT)
_IN_THE_WAY = (FileExistsError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class Failure:
    """What a task could not do."""

    message: str
    errno: int = 0
    """Of the operating system; 0 when there is none."""
    is_user_error: bool = False

    def raise_again(self) -> None:
        """Raises OSError for a full disk (see `storage_errors`), otherwise UserError."""
        if self.errno in _FULL:
            raise OSError(self.errno, self.message)
        if self.is_user_error:
            raise UserError(self.message)
        raise UserError(f"a task failed: {self.message}; what is finished is kept, run the command again")


def as_failure(error: Exception) -> Failure | None:
    """The failure to send, or None when the exception is a fault of ours and must be raised."""
    if isinstance(error, UserError):
        return Failure(str(error), is_user_error=True)
    number = getattr(error, "errno", None) or 0
    if number in _FULL:
        return Failure(str(error), number)
    if isinstance(error, (PermissionError, ConnectionError, TimeoutError, *_IN_THE_WAY)):
        return Failure(reason(error), number)
    # The errors of stores' own packages; a plain OSError, say of a file that should be there, is a fault of ours.
    if is_store_error(error) and not isinstance(error, OSError):
        return Failure(reason(error), number)
    return None
