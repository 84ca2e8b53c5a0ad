"""The command line: a module per command; `main` turns bad input into a sentence and a status.

Heavy imports (torch, transformers) happen inside the commands, so that `--help` is immediate.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer

from lowbit.cli.bench import bench_command
from lowbit.cli.calibrate import calibrate_command
from lowbit.cli.convert import convert_command
from lowbit.cli.eval import eval_command
from lowbit.cli.finetune import finetune_command
from lowbit.cli.generate import generate_command
from lowbit.cli.inspect import inspect_command
from lowbit.cli.merge import merge_command
from lowbit.cli.quantize import quantize_command
from lowbit.cli.sweep import sweep_command
from lowbit.cli.verify import verify_command
from lowbit.errors import LowbitError

app = typer.Typer(
    name="lowbit",
    help="Quantize Hugging Face decoders to 2-8 bits, run them, and measure what was lost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("quantize")(quantize_command)
app.command("calibrate")(calibrate_command)
app.command("sweep")(sweep_command)
app.command("eval")(eval_command)
app.command("generate")(generate_command)
app.command("bench")(bench_command)
app.command("finetune")(finetune_command)
app.command("convert")(convert_command)
app.command("verify")(verify_command)
app.command("inspect")(inspect_command)
app.command("merge")(merge_command)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Prints a warning as a sentence, without the line of code that it came from."""
    print(f"lowbit: warning: {message}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; exits with 0, 2 for bad input, 3 for failed checks."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app(args=arguments)
    except LowbitError as error:
        print(f"lowbit: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
