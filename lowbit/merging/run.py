"""`merge`: base and adapter become a checkpoint, and what that changed is measured.

The result is either an ordinary 16-bit checkpoint or, by the same pipeline as any quantization, a
low-bit one. Where the divergence is above the limit the checkpoint stays complete, and its manifest
says that it was not accepted: hours of quantization are not thrown away, and the status of the
command is an error.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lowbit.algorithms import Algorithm
from lowbit.calibration.tokens import TokenWindows
from lowbit.checkpoint import write_json
from lowbit.checkpoint.journal import MANIFEST_NAME, refuse_occupied, threads_of_run
from lowbit.checkpoint.reader import read_json
from lowbit.errors import LowbitError, VerificationError
from lowbit.hf.config import LowbitConfig
from lowbit.hf.loading import choose_device, evaluation_windows
from lowbit.merging.exact import can_merge_exactly, write_exact
from lowbit.merging.measure import Measured, measure, require_peft
from lowbit.merging.plain import write_plain
from lowbit.merging.source import MergedCheckpoint
from lowbit.model_card import write_card
from lowbit.model_card.saving import after_save
from lowbit.pipeline import quantize
from lowbit.pipeline.source import local_directory
from lowbit.pipeline.stored_statistics import StoredStatistics
from lowbit.progress import RunProgress
from lowbit.scheme import Scheme

PLAIN: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}
# Limits of KL(base + adapter || merged), nats per token, by bits of a weight; see
# docs/design/finetuning.md. Well above what merges of the bundled model give without data.
MAX_KL = {2: 1.0, 3: 0.3, 4: 0.1, 8: 0.02, 16: 0.01, 32: 0.01}
DEFAULT_TEXT = "pydoc"
DEFAULT_WINDOWS = 16


@dataclass(frozen=True)
class HeldOut:
    """What a merge is measured on, and what it may change.

    Args:
        text: file, data set or token ids, as for `lowbit eval`; None for CPython's help topics.
        seqlen: tokens in a window; None for 2048, or the model's longest.
        windows: at most so many.
        max_kl: limit of the mean divergence, nats per token; None for that of the target's bits.
        force: accept what is above the limit.
        skip: do not measure at all, which needs memory for both models.
    """

    text: str | None = None
    seqlen: int | None = None
    windows: int = DEFAULT_WINDOWS
    max_kl: float | None = None
    force: bool = False
    skip: bool = False


@dataclass(frozen=True)
class MergeResult:
    """A finished merge.

    Args:
        path: the checkpoint.
        target: dtype or scheme of its linear layers.
        manifest: the content of its `lowbit_manifest.json`.
        measured: what it changed; None where that was skipped.
        max_kl: the limit that held.
    """

    path: Path
    target: str
    manifest: dict[str, Any]
    measured: Measured | None
    max_kl: float

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values, without the manifest."""
        measured = None if self.measured is None else self.measured.to_dict()
        path = {"path": str(self.path), "target": self.target}
        return {**path, "measured": measured, "max_kl": self.max_kl}


def merge(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    to: str | Scheme = "bf16",
    stats: str | Path | None = None,
    calibration: str | Path | None = None,
    samples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    algorithm: str | Algorithm | None = None,
    quality: str | None = None,
    held_out: HeldOut | None = None,
    device: str | torch.device | None = None,
    resume: bool = False,
    verify: bool = True,
    progress: bool = True,
) -> MergeResult:
    """Merges an adapter into its base and returns the measured result; streaming, resumable.

    Args:
        base: folder of a 16-bit decoder or of a checkpoint of ours, or a hub name.
        adapter: folder of a LoRA adapter in PEFT's format.
        output: folder to write, new or empty.
        to: "bf16", "fp16" or "fp32" for an ordinary checkpoint; else a scheme to quantize the
            merged weights to. Which modules are quantized is taken over from a low-bit base. The
            scheme of the base itself, for an adapter of its zero points, merges exactly.
        stats: statistics of the base (of the 16-bit model that a low-bit one was), for a scheme.
        calibration: text for a scheme; the merged model is run on it, block by block.
        samples: calibration windows.
        seqlen: tokens in a calibration window.
        seed: chooses them.
        algorithm: see `lowbit.quantize`.
        quality: see `lowbit.quantize`; where neither is given, "balanced" with text, "fast" with
            statistics, round-to-nearest without data.
        held_out: what to measure on and the limit.
        device: where blocks are quantized and models are run.
        resume: go on with the unfinished run in `output`.
        verify: check the result as `lowbit verify` does, and mark it as bad if that fails.
        progress: show a progress bar on standard error.

    Raises:
        LowbitError: bad input.
        VerificationError: a check failed, or the divergence is above the limit; the checkpoint is
            complete then.
    """
    held_out = held_out or HeldOut()
    where, directory, target = choose_device(device), Path(output), _target(to)
    base_name, base = base, local_directory(base)
    source = MergedCheckpoint.of(base, adapter)
    _check_places(source, directory, resume)
    data: dict[str, Any] = {"stats": stats, "calibration": calibration}
    data |= {"algorithm": algorithm, "quality": quality}
    given = {name: value for name, value in data.items() if value is not None}
    if isinstance(target, torch.dtype) and given:
        raise LowbitError(
            f"--to {to} only rounds and has no use for {', '.join(given)}; leave that out, or give "
            "a scheme such as W4A16_G64"
        )
    if stats is not None:
        _require_unfolded(source, stats)
    _warn_of_another_base(source)
    windows = _windows(base, held_out)
    exact = isinstance(target, Scheme) and can_merge_exactly(source, target) and not given
    if isinstance(target, torch.dtype):
        with RunProgress(progress) as bar, threads_of_run(directory):
            write_plain(source, directory, target, resume, bar)
    elif exact:
        with RunProgress(progress) as bar:
            write_exact(source, directory, resume, bar)
    else:
        options: dict[str, Any] = {**data, "samples": samples, "seqlen": seqlen, "seed": seed}
        if algorithm is None and quality is None:
            options |= _method(calibration is not None, stats is not None)
        options |= _choice_of_base(source, target)
        options |= {"device": where, "resume": resume, "progress": progress, "verify": False}
        quantize(source, directory, scheme=target, **options)
    after_save(directory, source.path, str(base_name), verify, progress, where)
    limit = held_out.max_kl
    if limit is None:
        limit = default_max_kl(torch.float32 if exact else target)
    measured = None
    if windows is not None:
        # A merge to fp32 is seen to be exact only where both sides compute in it.
        dtype = "float32" if target == torch.float32 else "auto"
        measured = _measured(source, directory, windows, held_out, where, dtype, progress)
    return _judged(directory, _name(target), measured, limit, held_out.force)


def _method(text: bool, stats: bool) -> dict[str, str]:
    """Returns how to quantize where the user did not say, as `lowbit quantize` does it."""
    if text:
        return {"quality": "balanced"}
    # Stored statistics are of single layers; all else runs the model.
    return {"quality": "fast"} if stats else {"algorithm": "rtn"}


def default_max_kl(target: torch.dtype | Scheme) -> float:
    """Returns the limit for what a merge to `target` may change, nats per token."""
    return MAX_KL[8 * target.itemsize if isinstance(target, torch.dtype) else target.bits]


def _target(to: str | Scheme) -> torch.dtype | Scheme:
    if isinstance(to, str) and to.lower() in PLAIN:
        return PLAIN[to.lower()]
    try:
        return Scheme.parse(to)
    except LowbitError as error:
        raise LowbitError(f"--to {to}: neither bf16, fp16, fp32 nor a scheme: {error}") from error


def _name(target: torch.dtype | Scheme) -> str:
    return str(target).removeprefix("torch.")


def _check_places(source: MergedCheckpoint, directory: Path, resume: bool) -> None:
    for taken in (source.path, source.adapter.path):
        if directory.resolve() == taken.resolve():
            raise LowbitError(
                f"{directory}: is an input of the merge too; choose another output directory"
            )
    refuse_occupied(directory, resume)


def _warn_of_another_base(source: MergedCheckpoint) -> None:
    """Warns where PEFT noted another base; its names are paths of some machine, so no error."""
    named = source.adapter.config.base_model
    if named is not None and Path(named).name != source.path.resolve().name:
        warnings.warn(
            f"{source.adapter.path}: was trained on {named!r}, and is merged into {source.path}; "
            "shapes fit, but what it learned to correct may be another model's",
            stacklevel=3,
        )


def _windows(base: Path, held_out: HeldOut) -> TokenWindows | None:
    if held_out.skip:
        return None
    require_peft()
    text = held_out.text or DEFAULT_TEXT
    try:
        return evaluation_windows(str(base), text, held_out.seqlen, held_out.windows)
    except LowbitError as error:
        if held_out.text is not None:
            raise
        raise LowbitError(
            f"the merge cannot be measured on {DEFAULT_TEXT}: {error}; give --text, or --no-measure"
        ) from error


def _choice_of_base(source: MergedCheckpoint, target: Scheme) -> dict[str, Any]:
    """Returns which modules a low-bit base has quantized, as arguments of `quantize`.

    Rules that give single layers other schemes hold only where the scheme stays what it was.
    """
    if source.quantization is None:
        return {}
    selection = LowbitConfig.from_dict(dict(source.quantization)).selection()
    rules = {
        pattern: scheme
        for pattern, scheme in selection.dynamic
        if scheme is None or selection.scheme == target
    }
    return {
        "dynamic": rules or None,
        "modules_to_not_convert": selection.modules_to_not_convert,
        "quantize_lm_head": selection.quantize_lm_head,
        "quantize_embeddings": selection.quantize_embeddings,
    }


def _require_unfolded(source: MergedCheckpoint, stats: str | Path) -> None:
    """Refuses statistics of a model whose layers got other inputs by a fold."""
    StoredStatistics.open(stats)  # before anything is loaded
    recipe = (source.quantization or {}).get("recipe") or {}
    if "fold" in recipe:
        raise LowbitError(
            f"{source.path}: was made with {recipe['fold'].get('name', 'a fold')}, which scales "
            "the inputs of layers, so statistics of the 16-bit model do not fit; give "
            "--calibration instead of --stats"
        )


def _measured(
    source: MergedCheckpoint,
    directory: Path,
    windows: TokenWindows,
    held_out: HeldOut,
    device: torch.device,
    dtype: str,
    progress: bool,
) -> Measured:
    """Returns the measurement, that of an earlier run where it was on the same tokens."""
    stored = read_json(directory / MANIFEST_NAME, "the merge wrote it").get("measured")
    if isinstance(stored, dict) and stored.get("token_digest") == windows.digest:
        return Measured(**{key: stored[key] for key in Measured.__dataclass_fields__})
    with RunProgress(progress) as bar:
        bar.stage("measuring", len(windows))
        return measure(
            str(source.path),
            source.adapter.path,
            directory,
            windows,
            held_out.text or DEFAULT_TEXT,
            dtype,
            device,
            lambda: bar.advance(1),
        )


def _judged(
    directory: Path, target: str, measured: Measured | None, limit: float, force: bool
) -> MergeResult:
    """Records the measurement in the manifest and returns the result.

    Raises:
        LowbitError: if it is above the limit, and that is not forced.
    """
    manifest = read_json(directory / MANIFEST_NAME, "the merge wrote it")
    result = MergeResult(directory, target, manifest, measured, limit)
    if measured is None:
        return result
    above = not measured.kl <= limit
    manifest["measured"] = {**measured.to_dict(), "max_kl": limit, "accepted": force or not above}
    write_json(directory / MANIFEST_NAME, manifest)
    write_card(directory)
    if above and not force:
        raise VerificationError(
            f"{directory}: merging costs a KL of {measured.kl:.3g} nats per token, above the limit "
            f"of {limit:g} (--max-kl); the checkpoint is complete: --resume --force accepts it, "
            "more bits, --calibration or --stats make it better"
        )
    return replace(result, manifest=manifest)
