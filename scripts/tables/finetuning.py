"""Tables of fine-tuning: what adapters learn, speed and memory of a step."""

from __future__ import annotations

from typing import Any

from scripts.tables.markdown import footnote, gigabytes, markdown_table

LORA = "16 bits LoRA"


def finetune(result: dict[str, Any]) -> str:
    """Returns the table of `finetune_quality.py`."""
    rows = [
        [
            row["name"],
            f"{row['validation_loss']:.4f}",
            "-" if row is result["rows"][0] else _gap(row),
        ]
        for row in result["rows"]
    ]
    title = (
        f"`{result['model']}` learns `{result['data']}`: {result['steps']} steps of "
        f"{result['batch']} rows of {result['seqlen']} tokens, rank {result['rank']}; "
        f"{result['seeds']} seeds of split, order and adapters. Loss on the "
        f"{result['validation']:.0%} of the text that was not trained on, in nats per token.\n\n"
        f"![validation loss over steps](results/{result['figure']})\n\n"
    )
    header = ["base", "validation loss", "above 16-bit LoRA"]
    return title + markdown_table(header, rows) + "\n\n" + footnote(result)


def _gap(row: dict[str, Any]) -> str:
    error = row["standard_error"]
    return f"{row['above_16_bits']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def qlora(result: dict[str, Any]) -> str:
    """Returns the tables of `bench_qlora.py`, one for each model."""
    parts = []
    for case in result["cases"]:
        speed = {row["name"]: row["tokens_per_second"] for row in case["rows"]}
        peer = next((value for name, value in speed.items() if name.startswith("bits")), None)
        rows = [
            [
                row["name"],
                f"{row['tokens_per_second']:,.1f}",
                _ratio(row["tokens_per_second"], peer),
                _ratio(row["tokens_per_second"], speed.get(LORA)),
                gigabytes(row["peak_bytes"]),
            ]
            for row in case["rows"]
        ]
        title = (
            f"`{case['model']}` on {'a GPU' if case['device'] == 'cuda' else 'a CPU'}, "
            f"{case['batch']} rows of {case['seqlen']} tokens, rank {case['rank']}, "
            f"{'with' if case['checkpointing'] else 'without'} checkpointing; "
            f"the median of {case['steps']} steps, taken in turn; bitsandbytes "
            f"{case['peers']['bitsandbytes']}, PEFT {case['peers']['peft']}:\n\n"
        )
        header = ["", "tokens / s", "x bitsandbytes", "x 16-bit LoRA", "peak, GB"]
        parts.append(title + markdown_table(header, rows))
    return "\n\n".join([*parts, footnote(result)])


def finetune_memory(result: dict[str, Any]) -> str:
    """Returns the table of `measure_finetune_memory.py`."""
    shape, first = result["model"], result["cases"][0]
    rows = [
        [
            f"`{case['scheme']}`, {case['precision']}, {case['optimizer']}, "
            f"{'with' if case['checkpointing'] else 'without'} checkpointing",
            gigabytes(case["forecast"]["total"]),
            gigabytes(case["measured"]),
            f"{case['ratio']:.3f}",
        ]
        for case in result["cases"]
    ]
    title = (
        f"A random Llama of {shape['blocks']} blocks, width {shape['hidden']}, "
        f"{shape['vocab']:,} tokens; {first['batch']} rows of {first['seqlen']} tokens, rank "
        f"{first['rank']}:\n\n"
    )
    header = ["", "forecast, GB", "measured, GB", "ratio"]
    return title + markdown_table(header, rows) + "\n\n" + footnote(result)


def _ratio(value: float, other: float | None) -> str:
    return "-" if not other else f"{value / other:.2f}"
