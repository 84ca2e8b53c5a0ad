"""The errors a user can cause, each one sentence: what, got, needed, fix.

`LowbitError` is a `ValueError`, so library users need no special import; the command line
catches exactly this class, prints the sentence and exits with its status: 2 for bad input, 3 for
work that was done and failed its checks. Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Nothing that is worth saying takes more; names from files may.
MAX_MESSAGE = 2000


class LowbitError(ValueError):
    """Bad input: the message says what was wrong, what was needed and how to fix it.

    Messages quote names from files that anybody may have written. What a terminal would obey, and
    what no encoding has, is escaped, and whatever is too long is cut in its middle.
    """

    exit_status = 2

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


class VerificationError(LowbitError):
    """A checkpoint was written and failed a check; its files are all there."""

    exit_status = 3


def unknown_name(kind: str, got: str, known: Iterable[str]) -> LowbitError:
    """Returns the error for an unknown `kind` (scheme, ...), with the nearest valid name."""
    names = sorted(known)
    lowered = {name.lower(): name for name in names}
    close = difflib.get_close_matches(got.lower(), lowered, n=1, cutoff=0.4)
    hint = f"; did you mean {lowered[close[0]]!r}?" if close else ""
    return LowbitError(f"unknown {kind} {got!r}{hint} (known: {', '.join(names)})")


def _one_line(message: str) -> str:
    if len(message) > MAX_MESSAGE:
        half = MAX_MESSAGE // 2 - 10
        message = f"{message[:half]} [...] {message[-half:]}"
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
