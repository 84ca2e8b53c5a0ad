"""Regular expressions from files: matched with a limit, because a short one can run for ever.

`(\\w+\\.?)+[A-Z]` takes time exponential in the length of a name under Python's own `re`, and a
config that holds it would hang whatever opens it. The `regex` package, which transformers needs
too, takes the same expressions and can be told to stop.
"""

from __future__ import annotations

import regex

from lowbit.errors import LowbitError

# Of processor time, for one name; patterns that people write take microseconds.
SECONDS = 0.1


def require_pattern(pattern: str, where: str) -> None:
    """Raises unless `pattern` is a regular expression.

    Args:
        pattern: to be checked.
        where: of the message, what says so and of what.

    Raises:
        LowbitError: with the reason.
    """
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise LowbitError(
            f"{where}: {pattern[:200]!r} is not a regular expression ({error})"
        ) from None


def starts_with(pattern: str, name: str, where: str) -> bool:
    """Returns whether `pattern` matches at the start of `name`, as `re.match` would.

    Raises:
        LowbitError: it is none, or takes too long.
    """
    return _found(pattern, name, where, at_start=True)


def is_in(pattern: str, name: str, where: str) -> bool:
    """Returns whether `pattern` matches anywhere in `name`, as `re.search` would.

    Raises:
        LowbitError: it is none, or takes too long.
    """
    return _found(pattern, name, where, at_start=False)


def _found(pattern: str, name: str, where: str, at_start: bool) -> bool:
    require_pattern(pattern, where)
    compiled = regex.compile(pattern)  # from its cache
    search = compiled.match if at_start else compiled.search
    try:
        return search(name, timeout=SECONDS) is not None
    except TimeoutError:
        raise LowbitError(
            f"{where}: the pattern {pattern[:200]!r} takes too long on {name[:200]!r}; write it "
            "without repeats of repeats"
        ) from None
