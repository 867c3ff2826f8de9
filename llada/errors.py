"""The two kinds of failure: what the user can mend, and everything else.

A `UserError` becomes one line on the terminal, in a task's result or in an HTTP answer. Every other exception is a fault
of ours, or of the machine, and keeps its traceback wherever it goes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What the user can mend. The message is one line that names the thing, the place and the remedy."""


def hint(name: object, known: Iterable[str]) -> str:
    """What to say after "unknown x 'name'": the nearest of the `known` names, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
