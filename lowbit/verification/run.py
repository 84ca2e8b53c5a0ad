"""`verify` and the gate after every save."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.checkpoint import Checkpoint, TensorEntry
from lowbit.checkpoint.journal import CHECKSUM, JOURNAL_NAME
from lowbit.checkpoint.manifest import read_manifest
from lowbit.checkpoint.reader import CONFIG_NAME, IN_PROGRESS, read_json
from lowbit.errors import LowbitError, VerificationError
from lowbit.formats.model_view import ModelView
from lowbit.formats.reading import gguf_file, open_checkpoint
from lowbit.formats.table import layout_of
from lowbit.models.foreign import one_sentence
from lowbit.progress import RunProgress
from lowbit.verification.decoded import DecodedCheckpoint, DecodedDecoder, Inspector
from lowbit.verification.divergence import Comparison, judge, measure_divergence
from lowbit.verification.kernels import KernelDecoder
from lowbit.verification.marking import GGUF, clear_mark, mark, without_mark
from lowbit.verification.probe import Outcome, compare_with_model, probe_ids, run_probe
from lowbit.verification.report import Check, Checks, Report, listed
from lowbit.verification.stored import (
    Subject,
    check_files,
    check_hashes,
    check_quantized,
    not_finite,
)


def verify(
    path: str | Path,
    *,
    against: str | None = None,
    max_kl: float | None = None,
    text: str | None = None,
    seqlen: int | None = None,
    windows: int = 16,
    probe: bool = True,
    model: nn.Module | None = None,
    written: Mapping[str, str] | None = None,
    device: torch.device | None = None,
    progress: bool = False,
) -> Report:
    """Returns what is right and wrong about a checkpoint; nothing is written.

    Args:
        path: folder of a checkpoint in any format here, or a GGUF file or the folder of one.
        against: also measure the divergence from this original; both models are in memory then.
        max_kl: its limit, mean nats per token.
        text: what to measure on, as for `lowbit eval`; None for CPython's help topics.
        seqlen: tokens in a window of it; None for 2048, or the model's longest.
        windows: at most so many.
        probe: run a few tokens through the model; False checks files and weights only.
        model: the model that was saved, to compare its logits too.
        written: module -> checksum of its weight in memory, of a GGUF file, which has no manifest.
        device: where the probe runs; the CPU by default.
        progress: show a progress bar on standard error.

    Raises:
        LowbitError: there is no checkpoint, it is unfinished, or of an unknown kind. What is wrong
            with one is in the report.
    """
    path = gguf_file(path) or Path(path)
    if max_kl is not None and against is None:
        raise LowbitError("--max-kl is a limit for the divergence from an original; add --against")
    where = device or torch.device("cpu")
    with RunProgress(progress) as bar, without_mark(path) as directory:
        comparison = None
        if against is not None:
            comparison = Comparison(against, max_kl, text, seqlen, windows).opened(str(directory))
        verification = _Verification(directory, probe, model, where, bar)
        in_file = directory.suffix == GGUF and not directory.is_dir()
        report = verification.run_file(written) if in_file else verification.run()
        if comparison is not None:
            report = _compared(report, comparison, str(directory), where, bar)
    return _named(report, directory, path)


def gate(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    written: Mapping[str, str] | None = None,
    device: torch.device | None = None,
    progress: bool = False,
) -> Report:
    """Returns the report of a checkpoint that was just written and passes; marks one that fails.

    Args:
        path: folder of the checkpoint, or a GGUF file, which is marked by `.bad` after its name.
        model: the model that was saved, where it is in memory.
        written: module -> checksum of its weight in memory, of a GGUF file.
        device: where the probe runs; the CPU by default.
        progress: show a progress bar on standard error.

    Raises:
        VerificationError: it fails a check. Nothing is deleted; until a `lowbit verify` passes, no
            reader takes it.
    """
    report = verify(path, model=model, written=written, device=device, progress=progress)
    if report.ok:
        clear_mark(report)
        return report
    marked = mark(report)
    name, detail = next(iter(report.failed.items()))
    more = f", and {len(report.failed) - 1} other checks" if len(report.failed) > 1 else ""
    raise VerificationError(
        f"{path}: was written, but fails verification ({name}: {detail}{more}); it is marked, so "
        f"nothing loads it, and all files are kept for `lowbit verify {marked}`"
    )


def _named(report: Report, directory: Path, path: Path) -> Report:
    """Returns `report` with the path that the user gave."""
    checks = tuple(
        Check(c.name, c.passed, c.detail.replace(str(directory), str(path))) for c in report.checks
    )
    return Report(path, report.layout, checks, report.measured)


class _Verification:
    """The checks of one checkpoint, in order."""

    def __init__(
        self,
        directory: Path,
        probe: bool,
        model: nn.Module | None,
        device: torch.device,
        bar: RunProgress,
    ) -> None:
        self.directory, self.probe, self.model = directory, probe, model
        self.device, self.bar = device, bar
        self.checks = Checks()
        self.manifest: dict[str, Any] | None = None
        self.broken: list[tuple[TensorEntry, str]] = []

    def run(self) -> Report:
        """Returns the report."""
        config = self._config()
        self.layout = layout_of(Checkpoint(self.directory, config, {}))
        rest = ("hashes", "layout", "quantized", "tensors", "values", "weights", "probe")
        if not self.checks.run("files", self._open):
            self.checks.skip("the files do not hold together", *rest)
            return self._report()
        self.bar.stage("hashing", sum(e.end - e.begin for e in self.checkpoint.entries.values()))
        self.digests, self.broken = self.checkpoint.scan(self.bar.advance)
        if self.manifest is None:
            self.checks.skip("no manifest of lowbit came with it", "hashes")
        else:
            self.checks.run("hashes", self._hashes)
        if not self.checks.run("layout", self._layout):
            self.checks.skip("the layout does not fit", *rest[2:])
            return self._report()
        self.checks.run("quantized", lambda: check_quantized(self.subject, self.view))
        self._weights()
        return self._report()

    def run_file(self, written: Mapping[str, str] | None) -> Report:
        """Returns the report of a GGUF file, which has checks of its own and then the same."""
        from lowbit.formats.gguf import verify_file

        if not self.directory.is_file():
            raise LowbitError(f"{self.directory}: no such file; give a GGUF file or a folder")
        own = [Check(*row) for row in verify_file(self.directory)]
        self.checks.rows += own
        reports = {name: {CHECKSUM: checksum} for name, checksum in (written or {}).items()}
        self.manifest = {"parts": {"": {"modules": reports}}} if reports else None
        if all(check.passed for check in own):
            self.checkpoint = open_checkpoint(self.directory)
            self.layout = layout_of(self.checkpoint)
            if self.checks.run("layout", self._layout):
                self._weights()
        return Report(self.directory, "gguf", tuple(self.checks.rows))

    def _report(self) -> Report:
        return Report(self.directory, self.layout.name, tuple(self.checks.rows))

    def _config(self) -> dict[str, Any]:
        """Returns the config of a finished checkpoint."""
        if not self.directory.is_dir():
            raise LowbitError(f"{self.directory}: no such folder; give that of a checkpoint")
        config = read_json(self.directory / CONFIG_NAME, "a Hugging Face checkpoint has one")
        quantization = config.get("quantization_config")
        status = quantization.get("status") if isinstance(quantization, dict) else None
        if status == IN_PROGRESS or (self.directory / JOURNAL_NAME).exists():
            raise LowbitError(
                f"{self.directory}: is unfinished; end its run with --resume, then verify it"
            )
        return config

    def _open(self) -> str:
        self.checkpoint = Checkpoint.open(self.directory)
        self.manifest = read_manifest(self.directory)
        return check_files(self.checkpoint, self.manifest)

    def _hashes(self) -> str:
        assert self.manifest is not None
        return check_hashes(self.checkpoint, self.manifest, self.digests)

    def _layout(self) -> str:
        # On a CPU, float32 is exact and as fast as anything; see `pipeline/source.py`.
        self.view = ModelView(self.checkpoint, torch.float32)
        modules = self.layout.modules(self.checkpoint)
        if not modules and self.layout.name not in ("bf16", "gguf"):
            raise LowbitError(f"config.json says {self.layout.name}, but no tensor is quantized so")
        for name, stored in modules.items():
            shape = self.view.module(name).shape
            if shape is not None and shape != stored.shape:
                raise LowbitError(f"{name}: is {list(stored.shape)}, the model has {list(shape)}")
        self.subject = Subject(self.checkpoint, self.layout, modules, self.manifest)
        return f"{self.layout.name}, shapes and dtypes fit"

    def _weights(self) -> None:
        """Decodes every weight once, on its way through the probe where that is wanted."""
        self.inspector = Inspector(self.subject)
        found = self.checks.run("tensors", self._tensors)
        outcome: list[Outcome] = []
        probe = Checks()
        if not self.probe:
            probe.skip("it was not asked for", "probe")
        elif not found:
            probe.skip("the tensors do not make a model", "probe")
        elif self.broken:
            probe.skip("there are weights that are no numbers", "probe")
        else:
            probe.run("probe", lambda: self._probe(outcome))
        self.inspector.look_at_the_rest()
        self.checks.run("values", self._values)
        if self.inspector.compared or self.inspector.changed:
            self.checks.run("weights", self._unchanged)
        else:
            self.checks.skip("nothing recorded what was in memory", "weights")
        self.checks.rows += probe.rows

    def _tensors(self) -> str:
        decoded = DecodedCheckpoint(self.subject, self.view, self.inspector)
        self.reference = DecodedDecoder(decoded, self.view, self.device)
        ignored = self.reference.ignored
        return f"none missing{f'; not used: {listed(ignored)}' if ignored else ', none too many'}"

    def _probe(self, outcome: list[Outcome]) -> str:
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        kernels, why = None, "16-bit weights"
        if self.subject.modules:
            try:
                kernels = KernelDecoder(self.subject, dtype, self.device)
            except LowbitError as error:
                # What no kernel here runs is for engines, and not broken.
                if self.layout.name == "lowbit":
                    raise
                why = f"not run on our kernels: {error}"
        self.bar.stage("comparing", len(self.reference.layers))
        with one_sentence(str(self.directory), "model"):  # its own code meets its config here
            found = run_probe(self.reference, kernels, self.inspector, self.bar)
        outcome.append(found)
        detail = f"{len(found.logits)} tokens, {why}; logits are numbers"
        if found.difference is not None:
            detail = (
                f"{len(found.logits)} tokens, logits of kernels and of decoded weights differ by "
                f"{found.difference:.1g} of their size, blocks by up to {found.worst:.1g}"
            )
        if self.model is not None:
            ids = probe_ids(self.reference)
            difference = compare_with_model(self.model, ids, found.logits)
            detail += f"; those of the model in memory by {difference:.1g}"
        return detail

    def _values(self) -> str:
        bad = [*not_finite(self.broken), *self.inspector.bad_values]
        if bad:
            raise LowbitError(bad[0] + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""))
        return "no NaN, no Inf, no scale of zero"

    def _unchanged(self) -> str:
        changed = self.inspector.changed
        if changed:
            raise LowbitError(
                f"{listed(changed)}: decode to other weights than were in memory when they were "
                "written"
            )
        return f"{self.inspector.compared} decode to what was in memory when they were written"


def _compared(
    report: Report, comparison: Comparison, path: str, device: torch.device, bar: RunProgress
) -> Report:
    """Returns `report` with a row for the divergence from an original."""
    checks = Checks(list(report.checks))
    if not report.ok:
        checks.skip("other checks failed", "divergence")
        return Report(report.path, report.layout, tuple(checks.rows))
    measured = measure_divergence(path, comparison, device, bar)
    checks.run("divergence", lambda: judge(measured, comparison.max_kl))
    record = {"against": comparison.against, **measured.to_dict(), "max_kl": comparison.max_kl}
    return Report(report.path, report.layout, tuple(checks.rows), record)
