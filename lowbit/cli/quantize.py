"""`lowbit quantize`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lowbit.cli.allocation import allocation_of, print_allocation
from lowbit.cli.options import (
    Device,
    Engine,
    LossMask,
    Model,
    OptionalCalibration,
    Output,
    Resume,
    Samples,
    Seed,
    Seqlen,
    Stats,
    TensorParallel,
    TextField,
    Verify,
    print_serve,
    require_engine,
)
from lowbit.cli.screen import screen, size_on_disk
from lowbit.errors import LowbitError, unknown_name

if TYPE_CHECKING:
    from lowbit.algorithms import Algorithm


def quantize_command(
    model: Model,
    output: Output,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="For example W4A16_G64 (the default), W3A16_ASYM_G64, NF4_DQ.",
        ),
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(
            help="fast, balanced or best; balanced where --calibration is given, fast with --stats."
        ),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="Only this algorithm, nothing around it: gptq (needs --calibration or --stats), "
            "awq or awq+gptq (need --calibration), or rtn. Without any data rtn is the default."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of the algorithm; repeatable."),
    ] = None,
    calibration: OptionalCalibration = None,
    samples: Samples = 128,
    seqlen: Seqlen = 512,
    seed: Seed = 0,
    text_field: TextField = None,
    loss_mask: LossMask = False,
    stats: Stats = None,
    target_bits: Annotated[
        float | None,
        typer.Option(help="Choose a scheme per layer: at most so many bits per weight, 3.5."),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(help="The same for the size of all .safetensors files: 4.2GB, 900MiB."),
    ] = None,
    choice: Annotated[
        list[str] | None,
        typer.Option(metavar="SCHEME", help="What to choose from; repeatable."),
    ] = None,
    unfused: Annotated[
        bool, typer.Option("--unfused", help="q, k, v (gate, up) may get different schemes.")
    ] = False,
    sensitivities: Annotated[
        Path | None,
        typer.Option(help="Keep what was measured for the choice here; read if it exists."),
    ] = None,
    dynamic: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=SCHEME",
            help="Another scheme (or none) for modules whose name matches; repeatable.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="Leave this module in 16 bits; repeatable."),
    ] = None,
    quantize_lm_head: Annotated[bool, typer.Option(help="Also the output projection.")] = False,
    quantize_embeddings: Annotated[bool, typer.Option(help="Also the embedding.")] = False,
    engine: Engine = None,
    tp: TensorParallel = 1,
    device: Device = None,
    resume: Resume = False,
    verify: Verify = True,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the manifest's summary.")
    ] = False,
) -> None:
    """Quantize a checkpoint, one decoder block in memory at a time.

    Example: lowbit quantize ./llama ./llama-w4 --scheme W4A16_G64 --calibration text.txt

    Example: lowbit quantize ./llama ./llama-w4 --for vllm --tp 2 --calibration text.txt
    """
    from lowbit.engines import engine_named
    from lowbit.pipeline import quantize

    require_engine(engine, tp)
    chosen, quality, method = _method(
        algorithm, quality, option or [], calibration is not None, stats is not None
    )
    with exit_interrupted():
        result = quantize(
            model,
            output,
            scheme=scheme,
            algorithm=chosen,
            quality=quality,
            calibration=calibration,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            text_field=text_field,
            loss_mask=loss_mask,
            stats=stats,
            allocation=allocation_of(
                target_bits, target_size, choice or [], unfused, sensitivities
            ),
            device=device,
            dynamic=_dynamic(dynamic or []),
            modules_to_not_convert=tuple(keep or ()),
            quantize_lm_head=quantize_lm_head,
            quantize_embeddings=quantize_embeddings,
            engine=engine,
            tensor_parallel=tp,
            resume=resume,
            verify=verify,
        )
    # For an engine, the run that chose the codes is inside of the manifest of the conversion.
    chosen_by = result.manifest.get("quantized", result.manifest)
    summary = {**chosen_by["summary"], **result.manifest["summary"]}
    allocation = chosen_by.get("allocation")
    if engine is not None:
        summary["serve"] = engine_named(engine).command(result.path, tp)
    if json_output:
        shown = {"path": str(result.path), "method": method, **summary}
        shown |= {"allocation": allocation} if allocation else {}
        typer.echo(json.dumps(shown, indent=2))
    else:
        if allocation:
            print_allocation(allocation)
        _print_summary(result.path, method, summary)


@contextmanager
def exit_interrupted(
    rest: str = "finished blocks are kept, --resume goes on",
) -> Iterator[None]:
    """Ends the command with the usual status when the user interrupts it, and says the rest."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"lowbit: interrupted; {rest}", err=True)
        raise typer.Exit(130) from None


def _method(
    algorithm: str | None, quality: str | None, options: list[str], text: bool, stats: bool
) -> tuple[str | Algorithm | None, str | None, str]:
    """Returns the algorithm or else the quality to use, and words that say which.

    Args:
        algorithm: what the user named, if anything.
        quality: likewise.
        options: of the algorithm.
        text: whether there is calibration text.
        stats: whether there are stored statistics.
    """
    from lowbit.algorithms import ALGORITHMS, make_algorithm
    from lowbit.recipe import FOLDING

    if algorithm is not None and algorithm.lower() not in (*ALGORITHMS, *FOLDING):
        raise unknown_name("algorithm", algorithm, (*ALGORITHMS, *FOLDING))
    if options and algorithm is None:
        raise LowbitError(
            "--option is for an algorithm; name it with --algorithm, for example gptq"
        )
    if algorithm is not None and algorithm.lower() in FOLDING:
        if options:
            raise LowbitError(
                f"--algorithm {algorithm} takes no options; leave --option out, or give "
                "lowbit.quantize a Recipe"
            )
        return algorithm, quality, f"algorithm {algorithm}"
    if algorithm is not None:
        return make_algorithm(algorithm, **_options(options)), quality, f"algorithm {algorithm}"
    if quality is not None:
        return None, quality, f"quality {quality}"
    if text or stats:
        # Stored statistics are of the full-precision model and of single layers; all else runs it.
        quality = "balanced" if text else "fast"
        return None, quality, f"quality {quality}, the default with {'text' if text else 'stats'}"
    return make_algorithm("rtn"), None, "algorithm rtn, the default without data"


def _options(pairs: list[str]) -> dict[str, Any]:
    """Returns NAME=VALUE pairs with JSON values (true, 64, 0.01), else the text itself."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise LowbitError(f"--option {pair!r} is not NAME=VALUE, for example act_order=false")
        try:
            options[name.replace("-", "_")] = json.loads(text)
        except json.JSONDecodeError:
            options[name.replace("-", "_")] = text
    return options


def _dynamic(pairs: list[str]) -> dict[str, str | None]:
    """Returns REGEX=SCHEME pairs; the last `=` separates, `none` means 16 bits."""
    table: dict[str, str | None] = {}
    for pair in pairs:
        regex, separator, scheme = pair.rpartition("=")
        if not separator or not regex:
            raise LowbitError(
                f"--dynamic {pair!r} is not REGEX=SCHEME, for example down_proj=W8A16"
            )
        table[regex] = None if scheme.lower() == "none" else scheme
    return table


def _print_summary(path: Path, method: str, summary: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    table.add_row("written", str(path))
    table.add_row("size on disk", size_on_disk(path))
    table.add_row("method", method)
    table.add_row("schemes", ", ".join(summary["schemes"]))
    table.add_row("quantized weights", f"{summary['quantized_weights']:,}")
    table.add_row("bits per weight", f"{summary['bits_per_weight']:.3f} (scales included)")
    if "format" in summary:
        table.add_row("format", summary["format"])
    for name, reason in summary["fallbacks"].items():
        table.add_row("[yellow]fell back[/]", f"{name}: {reason}")
    screen().print(table)
    print_serve(summary)
