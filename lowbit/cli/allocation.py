"""Bit allocation on the command line: its options, and what was chosen as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lowbit.cli.screen import screen
from lowbit.errors import LowbitError

if TYPE_CHECKING:
    from lowbit.allocation.allocate import Allocation


def allocation_of(
    target_bits: float | None,
    target_size: str | None,
    choices: list[str],
    unfused: bool,
    sensitivities: Path | None,
) -> Allocation | None:
    """Returns what the options of the command line ask for, None without a target.

    Raises:
        LowbitError: see `Allocation`; also for options that need a target and have none.
    """
    if target_bits is None and target_size is None:
        given = {"--choice": choices, "--unfused": unfused, "--sensitivities": sensitivities}
        for name, value in given.items():
            if value:
                raise LowbitError(
                    f"{name} is for bit allocation; give --target-bits 3.5 or --target-size 4GB too"
                )
        return None
    from lowbit.allocation.allocate import OPTIONS, Allocation

    return Allocation(
        target_bits,
        target_size,
        options=tuple(choices) or OPTIONS,
        fused=not unfused,
        sensitivities=sensitivities,
    )


def print_allocation(allocation: dict[str, Any]) -> None:
    """Prints how many layers got which scheme, and what the choice is predicted to cost."""
    from lowbit.allocation.budget import describe_bytes
    from lowbit.scheme import Scheme

    used = {scheme: count for scheme, count in allocation["modules"].items() if count}
    gap = allocation["gap_percent"]
    proof = "optimal" if gap == 0 else f"at most {gap:.3g}% above the optimum"
    table = Table(title="schemes chosen")
    for heading in ("scheme", "layers", "bits"):
        table.add_column(heading, justify="left" if heading == "scheme" else "right")
    for scheme, count in used.items():
        parsed = Scheme.parse(scheme)
        table.add_row(scheme, str(count), str(parsed.bits))
    screen().print(table)
    facts = Table(show_header=False, box=None)
    facts.add_row("budget", describe_bytes(allocation["budget_bytes"]))
    facts.add_row("used", describe_bytes(allocation["bytes"]))
    facts.add_row("predicted loss", f"{allocation['predicted_loss']:.4g} nats per token, {proof}")
    screen().print(facts)
