"""The two kinds of failure: what the user can mend, and everything else.

A `UserError` becomes one line on the terminal, in a task's result or in an HTTP answer. Every other exception is a fault
of ours, or of the machine, and keeps its traceback wherever it goes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Set


class UserError(ValueError):
    """What the user can mend. The message is one line that names the thing, the place and the remedy."""


def hint(name: object, known: Iterable[str], *, shown: int = 30) -> str:
    """What to say after "unknown x 'name'": the nearest of the `known` names, or the first `shown` of them; those of a set by the
    alphabet."""
    names = sorted(known) if isinstance(known, Set) else list(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return f"known: {', '.join(names[:shown])}{more}"
