"""The card itself: a README.md that the hub understands and that holds nothing but what is known.

Everything in it comes from the files and the manifest beside it, so that it is the same however
often it is written. The first comment of a card of ours has the digest of the rest: a card that
somebody has edited is theirs, and stays.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit import __version__
from lowbit.checkpoint import Checkpoint, write_json
from lowbit.checkpoint.journal import MANIFEST_NAME
from lowbit.checkpoint.reader import read_json
from lowbit.checkpoint.writer import write_bytes
from lowbit.engines import ENGINES, engine_named, findings
from lowbit.errors import LowbitError
from lowbit.formats.base import StoredAs
from lowbit.formats.gguf.checkpoint import GgufCheckpoint
from lowbit.formats.gguf.layout import Gguf
from lowbit.formats.table import layout_of
from lowbit.model_card.commands import commands, method
from lowbit.model_card.origin import CARD_NAME, ORIGIN, recorded_manifest

MARKER = "<!-- lowbit card "
# Key of the manifest: what `lowbit verify --against --card` measured.
EVALUATION = "evaluation"


@dataclass(frozen=True)
class _Facts:
    """What a card says."""

    checkpoint: Checkpoint
    layout: str
    modules: Mapping[str, StoredAs]
    manifest: Mapping[str, Any]

    @property
    def origin(self) -> Mapping[str, Any]:
        return self.manifest.get(ORIGIN) or {}

    @property
    def schemes(self) -> Counter[str]:
        """Scheme -> number of weights' matrices, the most common first."""
        return Counter(str(stored.scheme) for stored in self.modules.values())

    @property
    def is_quantized(self) -> bool:
        """Whether there are codes; types of GGUF that are no schemes here are so too."""
        if self.layout != Gguf.name:
            return bool(self.modules)
        return bool((self.manifest.get("summary") or {}).get("quantized_weights"))

    @property
    def chosen(self) -> Mapping[str, Any]:
        """The manifest of the run that chose the codes."""
        chosen = self.manifest.get("quantized")
        return chosen if isinstance(chosen, Mapping) else self.manifest


def write_card(directory: Path) -> bool:
    """Writes the card of a finished checkpoint; False where one of somebody else's stays.

    Raises:
        LowbitError: the checkpoint is damaged.
    """
    file = directory / CARD_NAME
    return _write(file, _facts(Checkpoint.open(directory), recorded_manifest(directory)))


def write_gguf_card(file: Path, manifest: Mapping[str, Any]) -> bool:
    """Writes the card of a GGUF file into its folder; False where somebody else's stays.

    Args:
        file: in a folder of its own.
        manifest: of the run that wrote it.
    """
    return _write(file.with_name(CARD_NAME), _facts(GgufCheckpoint.open_file(file), manifest))


def _facts(checkpoint: Checkpoint, manifest: Mapping[str, Any]) -> _Facts:
    layout = layout_of(checkpoint)
    return _Facts(checkpoint, layout.name, layout.modules(checkpoint), manifest)


def _write(file: Path, facts: _Facts) -> bool:
    if file.exists() and not _is_untouched(file):
        warnings.warn(
            f"{file}: was not written by lowbit, or edited since, so it stays as it is; move it "
            "away for a model card",
            stacklevel=3,
        )
        return False
    write_bytes(file, _sealed(_metadata(facts), "\n".join(_body(facts))).encode())
    return True


def write_measured(directory: Path, measured: Mapping[str, Any]) -> None:
    """Puts a comparison with the original into manifest and card.

    Args:
        directory: a checkpoint of ours.
        measured: of a report of `lowbit verify --against`.

    Raises:
        LowbitError: it has no manifest.
    """
    file = directory / MANIFEST_NAME
    manifest = read_json(file, "--card is for checkpoints that lowbit wrote")
    name = str(measured["against"])
    against = Path(name).resolve().name if Path(name).exists() else name
    manifest[EVALUATION] = {**measured, "against": against}
    write_json(file, manifest)
    write_card(directory)


def _sealed(metadata: str, body: str) -> str:
    digest = hashlib.sha256((metadata + body).encode()).hexdigest()[:16]
    return f"---\n{metadata}---\n{MARKER}{digest} -->\n{body}\n"


def _is_untouched(file: Path) -> bool:
    """Returns whether a card is one of ours, as we wrote it."""
    text = file.read_text(encoding="utf-8", errors="replace")
    head, marker, rest = text.partition(MARKER)
    digest, _, body = rest.partition(" -->\n")
    metadata = head.removeprefix("---\n").removesuffix("---\n")
    return bool(marker) and _sealed(metadata, body.removesuffix("\n")) == text and digest != ""


def _metadata(facts: _Facts) -> str:
    """Returns the YAML that the hub reads."""
    from huggingface_hub import ModelCardData

    origin = facts.origin
    bits = sorted({stored.scheme.bits for stored in facts.modules.values()})
    tags = ["lowbit", *([] if facts.layout == "lowbit" else [facts.layout])]
    tags += [f"{width}-bit" for width in bits]
    tags = list(dict.fromkeys(tags))
    fields = dict(origin.get("metadata") or {})
    if origin.get("base_model"):
        fields["base_model"] = origin["base_model"]
        fields["base_model_relation"] = "quantized" if facts.is_quantized else "finetune"
    fields["library_name"] = "gguf" if facts.layout == Gguf.name else "transformers"
    return ModelCardData(**fields, tags=tags).to_yaml() + "\n"


def _body(facts: _Facts) -> Iterator[str]:
    origin = facts.origin
    name = str(origin.get("name", facts.checkpoint.path.name))
    base = f"[{name}](https://huggingface.co/{name})" if origin.get("base_model") else f"`{name}`"
    types = (facts.manifest.get("summary") or {}).get("schemes", ())
    schemes = ", ".join(types if facts.layout == Gguf.name else facts.schemes) or _dtype(facts)
    title = name.rpartition("/")[2]
    yield f"# {title}, {schemes}\n"
    made = "quantized" if facts.is_quantized else "merged or decoded"
    yield f"{base}, {made} by lowbit {__version__}.\n"
    yield "| | |\n| --- | --- |"
    for key, value in _rows(facts):
        yield f"| {key} | {_cell(value)} |"
    yield from _measured(facts)
    yield from _loading(facts)
    lines = commands(facts.manifest)
    if lines:
        yield "\n## Made by\n\n```bash"
        yield from lines
        yield "```"
    if facts.layout == Gguf.name:
        yield "\nThe file has the SHA-256 of its own data; `lowbit verify` checks it."
        return
    yield (
        f"\n`{MANIFEST_NAME}` has the SHA-256 of every file and what was measured of every weight; "
        "`lowbit verify` checks them."
    )


def _rows(facts: _Facts) -> Iterator[tuple[str, str]]:
    yield "format", facts.layout
    if facts.layout == Gguf.name:
        yield from _gguf_rows(facts)
    elif facts.modules:
        counts = [f"{scheme} ({count})" for scheme, count in facts.schemes.most_common()]
        yield "scheme (matrices)", ", ".join(counts)
        yield from _method(facts)
        rounded = (facts.manifest.get("summary") or {}).get("rounded")
        if rounded:
            worst = max((error for error in rounded.values() if error is not None), default=None)
            error = "" if worst is None else f", relative error up to {worst:.3g}"
            yield "rounded again in conversion", f"{len(rounded)} matrices{error}"
        weights = sum(math.prod(stored.shape) for stored in facts.modules.values())
        bits = 8 * _bytes(facts, [t for s in facts.modules.values() for t in s.tensors]) / weights
        yield "bits per weight", f"{bits:.3f} in {weights:,} weights, scales included"
    entries = facts.checkpoint.entries
    owned = {t for stored in facts.modules.values() for t in stored.tensors}
    plain = _bytes(facts, [name for name in entries if name not in owned])
    if facts.layout == Gguf.name:
        held = (facts.manifest.get("summary") or {}).get("quantized_bytes", 0)
        plain = _bytes(facts, list(entries)) - held
    if facts.is_quantized and plain:
        yield "in 16 or 32 bits", f"{plain / 1e6:,.1f} MB: embeddings, norms and what was left out"
    size = sum(file.stat().st_size for file in facts.checkpoint.files())
    yield "size on disk", f"{size / 1e6:,.1f} MB"


def _gguf_rows(facts: _Facts) -> Iterator[tuple[str, str]]:
    """Yields what a GGUF file holds: some of its types are no schemes here."""
    summary = facts.manifest.get("summary") or {}
    yield "types", ", ".join(summary.get("schemes", ()))
    yield from _method(facts)
    weights = summary.get("quantized_weights", 0)
    if weights:
        bits = summary["bits_per_weight"]
        yield "bits per weight", f"{bits:.3f} in {weights:,} weights, scales included"


def _method(facts: _Facts) -> Iterator[tuple[str, str]]:
    """Yields how codes were chosen, where the manifest tells."""
    fingerprint = facts.chosen.get("fingerprint")
    fingerprint = fingerprint if isinstance(fingerprint, Mapping) else {}
    options = fingerprint.get("options")
    if isinstance(fingerprint.get("qat"), Mapping):
        yield "algorithm", f"quantization-aware training ({fingerprint['qat'].get('mode')})"
    elif isinstance(options, Mapping) and "algorithm" in options:
        option, value = method(options)
        own = options["algorithm"]
        quality = f"{own}, quality {value}" if option == "--quality" else value
        yield "algorithm", quality
    calibration = fingerprint.get("calibration")
    if isinstance(calibration, Mapping):
        samples, seqlen = calibration.get("samples"), calibration.get("seqlen")
        yield (
            "calibration",
            f"{calibration.get('source')}, {samples} windows of {seqlen} tokens, "
            f"SHA-256 of the ids {calibration.get('digest')}",
        )
    elif isinstance(options, Mapping) and "algorithm" in options and "qat" not in fingerprint:
        yield "calibration", "none"


def _measured(facts: _Facts) -> Iterator[str]:
    """Yields what was measured against the original, or how to."""
    found = facts.manifest.get(EVALUATION) or facts.manifest.get("measured")
    yield "\n## Measured\n"
    if not isinstance(found, Mapping):
        how, end = "verify {} --against ORIGINAL --card", ", and puts them here."
        if facts.layout == Gguf.name:
            how, end = "eval {} --against ORIGINAL --text TEXT", "."
        yield (
            f"Not yet. `lowbit {how.format(_place(facts))}` measures KL divergence, perplexity and "
            f"flips against the original{end}"
        )
        return
    against = found.get("against", "base and adapter as PEFT computes them")
    error = "" if found.get("kl_error") is None else f" ± {found['kl_error']:.1g}"
    yield f"Against {against}, on {found['predictions']:,} tokens of {found['text']}:\n"
    yield "| | |\n| --- | --- |"
    yield f"| KL divergence, nats per token | {found['kl']:.3g}{error} |"
    before, after = found["perplexity_before"], found["perplexity_after"]
    yield f"| perplexity, original | {before:.4g} |\n| perplexity, this model | {after:.4g} |"
    yield f"| flips (most likely next token differs) | {found['flips']:.2%} |"


def _loading(facts: _Facts) -> Iterator[str]:
    """Yields how every engine that serves it loads it, and why the others do not."""
    place = _place(facts)
    yield "\n## Load\n"
    yield "On lowbit's kernels, in Python:\n\n```python"
    if facts.layout == "lowbit":
        yield "from transformers import AutoModelForCausalLM  # and `pip install lowbit`\n"
        yield 'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n```'
    else:
        yield f'import lowbit\n\nmodel = lowbit.load("{place}")\n```'
    schemes = {name: stored.scheme for name, stored in facts.modules.items()}
    refused = []
    for name in ENGINES:
        why = _refusals(name, facts, schemes)
        if why:
            refused.append(f"- {why[0]}")
        elif name != "transformers" or facts.layout != "lowbit":
            command = engine_named(name).command(place)
            yield f"\nIn {engine_named(name)}:\n\n```\n{command}\n```"
    if refused:
        yield "\nNot served as it is (`lowbit convert` makes other formats of it):\n"
        yield from refused


def _place(facts: _Facts) -> str:
    return f"FOLDER/{facts.checkpoint.path.name}" if facts.layout == Gguf.name else "FOLDER"


def _refusals(engine: str, facts: _Facts, schemes: Mapping[str, Any]) -> list[str]:
    try:
        return findings(engine, facts.layout, schemes, facts.checkpoint.config)
    except LowbitError as error:
        return [str(error)]


def _bytes(facts: _Facts, names: list[str]) -> int:
    entries = (facts.checkpoint.entries[name] for name in names)
    return sum(entry.end - entry.begin for entry in entries)


def _dtype(facts: _Facts) -> str:
    config = facts.checkpoint.config
    return str(config.get("dtype", config.get("torch_dtype", "16 bits")))


def _cell(text: str) -> str:
    """Returns text that cannot end a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")
