"""`lowbit finetune`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lowbit.cli.forecast import print_forecast
from lowbit.cli.options import Device, Model, Resume
from lowbit.cli.quantize import exit_interrupted
from lowbit.cli.screen import screen

if TYPE_CHECKING:
    from lowbit.train import FinetuneResult


def finetune_command(
    base: Model,
    data: Annotated[
        str, typer.Option(help="JSONL, text, pydoc, or a data set: messages, instruction, text.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the result; new or empty.")],
    scheme: Annotated[
        str | None, typer.Option(help="Quantize a 16-bit base to this while loading: NF4_DQ.")
    ] = None,
    qat: Annotated[
        str | None,
        typer.Option(metavar="SCHEME", help="No adapter: train the model for W4A16_G64, say."),
    ] = None,
    qat_mode: Annotated[
        str, typer.Option(help="weights, or scales: codes stay, also those of a lowbit base.")
    ] = "weights",
    validation: Annotated[
        str | None, typer.Option(help="A source of its own, or a share of the data: 0.05.")
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens per row; 1024, or the model's longest.")
    ] = None,
    loss_on: Annotated[str, typer.Option(help="Tokens that count: answers or all.")] = "answers",
    packing: Annotated[bool, typer.Option(help="Lay several examples in a row.")] = True,
    rank: Annotated[int, typer.Option(help="Of the adapter.")] = 16,
    alpha: Annotated[
        float | None, typer.Option(help="Scales it by alpha / rank; twice the rank.")
    ] = None,
    dropout: Annotated[float, typer.Option(help="Of its input.")] = 0.0,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="Adapt these only, q_proj; repeatable."),
    ] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="Also learn magnitudes.")] = False,
    qa_lora: Annotated[
        bool, typer.Option("--qa-lora", help="An adapter that merges exactly (asymmetric schemes).")
    ] = False,
    init: Annotated[str, typer.Option(help="default, gaussian, or residual.")] = "default",
    weights: Annotated[
        str | None, typer.Option(help="Of init residual: folder of the 16-bit model.")
    ] = None,
    stats: Annotated[
        str | None, typer.Option(help="Of init residual: what `lowbit calibrate` wrote.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int | None, typer.Option(help="Steps instead.")] = None,
    batch: Annotated[int, typer.Option(help="Rows at once on each device.")] = 4,
    accumulation: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate; 2e-4, of QAT by its mode.")
    ] = None,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Steps, or a share of them below 1.")] = 0.03,
    optimizer: Annotated[
        str, typer.Option(help="adamw, adafactor; on a GPU also adamw_8bit, paged_adamw_8bit.")
    ] = "adamw",
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Clip gradients to this; 0 does not.")] = 1.0,
    precision: Annotated[
        str, typer.Option(help="auto (bf16 on a GPU, fp32 on a CPU), bf16, fp16, fp32.")
    ] = "auto",
    checkpointing: Annotated[
        bool, typer.Option(help="Recompute activations instead of keeping them.")
    ] = True,
    eval_steps: Annotated[int | None, typer.Option(help="Steps between validations.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after N validations without a better loss.")
    ] = None,
    log_steps: Annotated[int, typer.Option(help="Steps between points of the curve.")] = 1,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also log to OUTPUT/tensorboard.")
    ] = False,
    device: Device = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores by default.")] = None,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how much memory it will take.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train an adapter (QLoRA) on a frozen base, 16-bit or of few bits.

    Example: lowbit finetune ./llama-nf4 --data train.jsonl --output ./adapter --validation 0.05
    """
    from rich.console import Console

    from lowbit.hf.loading import quiet_libraries, use_threads
    from lowbit.train import (
        AdapterSettings,
        BaseSettings,
        DataSettings,
        QatSettings,
        Settings,
        TrainSettings,
        default_lr,
        finetune,
    )

    quiet_libraries()
    use_threads(threads)
    file, share = _validation(validation)
    trained_for = None if qat is None else QatSettings(qat, qat_mode)
    settings = Settings(
        BaseSettings(scheme, device),
        DataSettings(seqlen, loss_on, packing, file, share),
        AdapterSettings(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            targets=tuple(target) if target else "all-linear",
            rslora=rslora,
            dora=dora,
            qa_lora=qa_lora,
            init=init,
            weights=weights,
            statistics=stats,
        ),
        TrainSettings(
            epochs=epochs,
            max_steps=max_steps,
            batch=batch,
            accumulation=accumulation,
            optimizer=optimizer,
            lr=default_lr(trained_for) if lr is None else lr,
            schedule=schedule,
            warmup=warmup,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            precision=precision,
            checkpointing=checkpointing,
            eval_steps=eval_steps,
            save_steps=save_steps,
            patience=patience,
            log_steps=log_steps,
            seed=seed,
            tensorboard=tensorboard,
        ),
        trained_for,
    )
    if dry_run:
        print_forecast(base, settings, json_output)
        return
    with exit_interrupted("--resume goes on from the last checkpoint"):
        result = finetune(
            base,
            data,
            output,
            settings=settings,
            resume=resume,
            progress=Console(stderr=True).is_terminal,
        )
    if int(os.environ.get("RANK", "0")):
        return  # another process of the launcher speaks
    if json_output:
        typer.echo(json.dumps({"output": str(output), **result.manifest}, indent=2))
    else:
        _print(result)


def _validation(given: str | None) -> tuple[str | None, float | None]:
    """Returns (source, share) of what `--validation` says."""
    if given is None:
        return None, None
    try:
        return None, float(given)
    except ValueError:
        return given, None


def _print(result: FinetuneResult) -> None:
    from lowbit.train.curve import PLOT_NAME

    manifest = result.manifest
    data, measured = manifest["fingerprint"]["data"], manifest["measured"]
    train = data["train"]
    table = Table(show_header=False, box=None)
    qat = manifest["fingerprint"]["settings"]["qat"]
    made = "adapter" if qat is None else f"{qat['scheme']} model"
    table.add_row(made, str(result.output))
    table.add_row("parameters", f"{result.trainable:,}")
    table.add_row(
        "examples",
        f"{train['examples']:,} of {train['rows']:,} rows in {train['source']}, "
        f"{train['counted_tokens']:,} of {train['tokens']:,} tokens counted",
    )
    if train["truncated"]:
        table.add_row("[yellow]truncated[/]", f"{train['truncated']:,} examples")
    if train["dropped"]:
        table.add_row("[yellow]dropped[/]", f"{train['dropped']:,} rows with nothing to learn")
    table.add_row("rows", f"{data['rows']['train']:,} of {data['seqlen']:,} tokens at most")
    stopped = ", stopped early" if manifest["stopped_early"] else ""
    table.add_row("steps", f"{result.steps:,}{stopped}, the {made} is of step {result.step:,}")
    table.add_row("training loss", f"{result.train_loss:.4f}")
    if result.validation_loss is not None:
        table.add_row("validation loss", f"{result.validation_loss:.4f}")
    if measured:
        table.add_row("speed", f"{measured['tokens_per_second']:,.0f} tokens/s")
        table.add_row("peak memory", f"{measured['peak_memory_bytes'] / 1e9:.2f} GB")
    if (result.output / PLOT_NAME).exists():
        table.add_row("curve", str(result.output / PLOT_NAME))
    else:
        table.add_row("[yellow]no curve[/]", "drawing needs matplotlib: pip install 'lowbit[plot]'")
    screen().print(table)
