"""Tables of what machines were measured at: memory, kills, kernels."""

from __future__ import annotations

from typing import Any

from scripts.tables.markdown import footnote, gigabytes, markdown_table

# Candidates of ours in cpu.json, the default first.
CPU_OWN = ("lowbit A16", "lowbit A8")


def memory(result: dict[str, Any]) -> str:
    """Returns the table of `measure_memory.py`."""
    model = result["model"]
    tokens = result["samples"] * result["seqlen"]
    blocks = f"{result['gptq_blocks']} of {model['blocks']} blocks"
    names = {
        "imports": "imports alone",
        "rtn": f"quantize, {result['scheme']}, rtn",
        "gptq": f"quantize, {result['scheme']}, gptq, {blocks}, {tokens:,} tokens",
        "load": "`from_pretrained` and one reading of "
        f"{gigabytes(result['quantized_bytes_on_disk'])} GB",
        "forward": "the same and a forward pass of 16 tokens",
        "on_load": "`from_pretrained` of the 16-bit model, quantizing while it loads",
    }
    rows = [
        [
            label,
            gigabytes(result["cases"][case]["peak_rss_bytes"]),
            gigabytes(result["cases"][case]["peak_anonymous_bytes"]),
            gigabytes(result["cases"][case]["peak_file_bytes"]),
            f"{result['cases'][case]['seconds']:,.0f} s",
        ]
        for case, label in names.items()
    ]
    introduction = (
        f"A random Llama of {model['parameters'] / 1e9:.2f}e9 parameters, "
        f"{gigabytes(model['bytes_on_disk'])} GB on disk, {gigabytes(model['block_bytes'])} GB a "
        f"block. Loading takes {result['load_ratio']:.2f} times the size of the files beyond the "
        "imports.\n\n"
    )
    header = ["", "peak RSS, GB", "of it allocated", "mapped files", "time"]
    return introduction + markdown_table(header, rows) + "\n\n" + footnote(result)


def kill_resume(result: dict[str, Any]) -> str:
    """Returns the sentence of `kill_resume.py`."""
    spread = [shards for trial in result["trials"] for shards in trial["shards_at_kill"]]
    return (
        f"{result['runs']} runs of `{result['scheme']}` with {result['algorithm']} got SIGKILL "
        f"{result['kills']} times at random moments, with {min(spread, default=0)} to "
        f"{max(spread, default=0)} shards finished; resumed, "
        f"**{result['runs_with_identical_files']} of {result['runs']}** had the "
        f"{result['files_compared']} files of an uninterrupted run, byte for byte.\n\n"
        f"{footnote(result)}"
    )


def kernels(result: dict[str, Any]) -> str:
    """Returns the code of the fused kernels for sm_90, from `inspect_kernels.py`."""
    entries = result["kernels"]
    fused = [
        entry
        for entry in entries
        if entry["target"] == "sm_90" and entry["instructions_per_weight"] is not None
    ]
    rows = [
        [
            entry["case"],
            f"{entry['instructions_per_weight']:.2f}",
            str(entry["registers"]),
            f"{entry['shared'] / 1024:.0f}",
        ]
        for entry in fused
    ]
    title = (
        f"{len({entry['case'] for entry in entries})} kernels, compiled for "
        f"{len({entry['target'] for entry in entries})} targets: "
        f"{sum(entry['spilled'] > 0 for entry in entries)} of {len(entries)} spill registers. The "
        f"fused ones on sm_90; {sum(entry['multiplies_from_registers'] for entry in fused)} of "
        f"{len(fused)} feed wgmma from registers:\n\n"
    )
    header = ["", "instructions per weight", "registers", "shared, KiB"]
    return title + markdown_table(header, rows) + "\n\n" + footnote(result, ("triton",))


def cpu(result: dict[str, Any]) -> str:
    """Returns the speed-ups of the CPU kernels and the decoder, from `make bench-cpu`."""
    parts = []
    for threads in sorted({entry["threads"] for entry in result["summary"]}):
        mine = [entry for entry in result["summary"] if entry["threads"] == threads]
        tokens = sorted({int(m) for entry in mine for m in entry["vs_bf16"]})
        rows = []
        for scheme in dict.fromkeys(entry["scheme"] for entry in mine):
            found = {e["candidate"]: e for e in mine if e["scheme"] == scheme}
            peers = [entry for entry in found.values() if entry["kind"] == "peer"]
            cells = []
            for m in map(str, tokens):
                own = [found.get(name, {"vs_bf16": {}})["vs_bf16"].get(m) for name in CPU_OWN]
                best = max((e["vs_bf16"][m] for e in peers if m in e["vs_bf16"]), default=None)
                cells.append(" / ".join("-" if x is None else f"{x:.2f}" for x in (*own, best)))
            shares = [found[n]["share_of_ceiling"].get("1") for n in CPU_OWN if n in found]
            share = next((x for x in shares if x is not None), None)
            rows.append([f"`{scheme}`", *cells, "-" if share is None else f"{100 * share:.0f}%"])
        title = (
            f"Times torch's bf16 product, threads: {threads}, {result['isa']}: 16-bit activations "
            "/ 8-bit activations / the fastest peer. The last column is the share of plain "
            "reading's speed at one token.\n\n"
        )
        header = ["", *(f"M = {m}" for m in tokens), "of reading"]
        parts.append(title + markdown_table(header, rows))
    if result["decoder"]:
        parts.append(_cpu_decoder(result["decoder"]))
    return "\n\n".join(parts) + "\n\n" + footnote(result)


def _cpu_decoder(measured: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{name}, threads: {row['threads']}",
            f"{entry['prefill_tokens_per_second']:.1f}",
            f"{entry['decode_tokens_per_second']:.1f}",
        ]
        for row in measured
        for name, entry in row["candidates"].items()
    ]
    first = measured[0]
    title = (
        f"A random Llama of 1B's shape in `{first['scheme']}`, the same weights everywhere: tokens "
        f"per second of a prompt of {first['prompt']}, and of {first['new']} new ones.\n\n"
    )
    return title + markdown_table(["", "prefill", "decode"], rows)
