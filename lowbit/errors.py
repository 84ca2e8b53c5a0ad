"""The errors a user can cause, each one sentence: what, got, needed, fix.

`LowbitError` is a `ValueError`, so library users need no special import; the command line
catches exactly this class, prints the sentence and exits with status 2. Anything else is a bug
of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LowbitError(ValueError):
    """Bad input: the message says what was wrong, what was needed and how to fix it."""


def unknown_name(kind: str, got: str, known: Iterable[str]) -> LowbitError:
    """Returns the error for an unknown `kind` (scheme, ...), with the nearest valid name."""
    names = sorted(known)
    lowered = {name.lower(): name for name in names}
    close = difflib.get_close_matches(got.lower(), lowered, n=1, cutoff=0.4)
    hint = f"; did you mean {lowered[close[0]]!r}?" if close else ""
    return LowbitError(f"unknown {kind} {got!r}{hint} (known: {', '.join(names)})")
