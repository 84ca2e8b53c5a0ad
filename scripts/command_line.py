"""What every script does around its work: bad input becomes one sentence and exit status 2."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from lowbit.errors import LowbitError


def parser(description: str | None, example: str) -> argparse.ArgumentParser:
    """Returns a parser that shows the first paragraph of a script's docstring and an example."""
    summary = (description or "").split("\n\n")[0]
    return argparse.ArgumentParser(
        description=summary,
        epilog=f"example: {example}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def run(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None]) -> None:
    """Parses the command line and calls `work`; exits with 2 where the input was bad."""
    arguments = parser.parse_args()
    try:
        work(arguments)
    except LowbitError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
