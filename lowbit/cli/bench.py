"""`lowbit bench`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.screen import screen
from lowbit.errors import LowbitError

if TYPE_CHECKING:
    from lowbit_eval.latency import Comparison
    from rich.table import Table


def bench_command(
    path: Annotated[str, typer.Argument(help="Folder of a checkpoint, or a hub name.")],
    prompt_tokens: Annotated[int, typer.Option(help="Tokens read at once.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens written one by one.")] = 64,
    rounds: Annotated[int, typer.Option(help="Repetitions; medians are printed.")] = 3,
    baseline: Annotated[
        bool, typer.Option(help="Also the same model in 16 bits, which needs its memory.")
    ] = True,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")
    ] = None,
    activations: Annotated[
        str, typer.Option(help="float, or int8: rounded while multiplying, on a CPU.")
    ] = "float",
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores by default.")] = None,
) -> None:
    """Measure prefill and decoding speed beside the same model in 16 bits.

    Example: lowbit bench ./llama-w4 --prompt-tokens 512 --new-tokens 64
    """
    from lowbit_eval.latency import Workload, compare, pieces_of, warm_up
    from rich.console import Console

    from lowbit.hf.loading import (
        choose_device,
        load_config,
        load_model,
        quiet_libraries,
        use_threads,
    )
    from lowbit.nn import kernels_of
    from lowbit.progress import RunProgress

    quiet_libraries()
    use_threads(threads)
    work = Workload(prompt_tokens, new_tokens, rounds)
    _check(work, load_config(path))
    target = choose_device(device)
    model: Any = load_model(path, dtype, target, activations)
    quantized = getattr(model, "hf_quantizer", None) is not None
    with RunProgress(enabled=Console(stderr=True).is_terminal) as progress:
        progress.stage("warming up", 1)
        warm_up(model, work)
        memory = _peak_bytes(target.type)
        other = load_model(path, dtype, target) if baseline and quantized else None
        if other is not None:
            other.dequantize()  # type: ignore[operator]
        progress.stage("rounds", pieces_of(work, other is not None))
        result = compare(model, other, work, lambda: progress.advance(1))
    if json_output:
        report = {
            "path": path,
            "device": str(target),
            "kernels": kernels_of(model),
            "peak_bytes": memory,
            **result.to_dict(),
        }
        typer.echo(json.dumps(report, indent=2))
        return
    console = screen()
    console.print(_table(result))
    console.print(_summary(result, memory, target.type))
    for name, count in kernels_of(model).items():
        console.print(f"kernels: {name}, {count} weights")


def _check(work: Any, config: Any) -> None:
    if work.prompt_tokens < 1:
        raise LowbitError(f"--prompt-tokens must be at least 1, got {work.prompt_tokens}")
    if work.new_tokens < 2:
        raise LowbitError(
            f"--new-tokens must be at least 2 (the first comes with the prompt), got "
            f"{work.new_tokens}"
        )
    if work.rounds < 1:
        raise LowbitError(f"--rounds must be at least 1, got {work.rounds}")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and work.prompt_tokens + work.new_tokens > longest:
        raise LowbitError(
            f"a prompt of {work.prompt_tokens} tokens and {work.new_tokens} new ones exceed the "
            f"model's {longest}; lower --prompt-tokens or --new-tokens"
        )


def _peak_bytes(device: str) -> int | None:
    import torch
    from lowbit_eval.speed import peak_rss_bytes

    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_rss_bytes()


def _table(result: Comparison) -> Table:
    from rich.table import Table

    table = Table("", "prefill tokens/s", "decode tokens/s", "p50 ms", "p90 ms", "p99 ms")
    rows = {"quantized": result.quantized, "16 bits": result.baseline}
    if result.baseline is None:
        rows = {"as stored": result.quantized}
    for name, latency in rows.items():
        if latency is not None:
            table.add_row(
                name,
                f"{latency.prefill_tokens_per_second:.1f}",
                f"{latency.decode_tokens_per_second:.1f}",
                f"{latency.p50_ms:.1f}",
                f"{latency.p90_ms:.1f}",
                f"{latency.p99_ms:.1f}",
            )
    return table


def _summary(result: Comparison, memory: int | None, device: str) -> str:
    kind = "GPU memory" if device == "cuda" else "resident memory"
    lines = [] if memory is None else [f"peak {kind}: {memory / 1e9:.2f} GB (quantized alone)"]
    if result.baseline is not None:
        ratio = result.quantized.decode_tokens_per_second / result.baseline.decode_tokens_per_second
        lines.append(f"decoding is {ratio:.2f} x that of 16 bits at batch 1")
        first, last = result.baseline_wins_from, max(result.step_ratio)
        if first is None:
            lines.append(f"16 bits are not faster at any batch up to {last}")
        else:
            lines.append(f"16 bits are faster from batch {first} on")
    return "\n".join(lines)
