"""A quantized checkpoint for an engine: what it would refuse is refused first, and its format last.

    schemes fit the engine? -> quantize into OUT.quantized -> convert to the engine's format: OUT

Nothing of quantizing or converting is done differently, so both steps check, resume and report as
they do alone. The folder beside the output is removed when the output is whole.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.allocation.allocate import OPTIONS, Allocation
from lowbit.checkpoint import Checkpoint, write_json
from lowbit.checkpoint.journal import JOURNAL_NAME, MANIFEST_NAME, stored_run
from lowbit.engines.choice import Target, with_scheme
from lowbit.engines.linter import Checkpoint as Given
from lowbit.engines.weights import described, dtype_of
from lowbit.errors import LowbitError
from lowbit.formats.gguf.layout import Gguf
from lowbit.formats.own import Lowbit
from lowbit.hf.config import LowbitConfig
from lowbit.model_card.origin import ORIGIN, origin_of
from lowbit.models.selection import select_modules
from lowbit.models.streaming import StreamedDecoder
from lowbit.pipeline.source import check_places
from lowbit.scheme import Scheme

if TYPE_CHECKING:
    from lowbit.pipeline.plan import Plan, QuantizedCheckpoint

DEFAULT_SCHEME = "W4A16_G64"
# Of the folder beside the output.
STAGING = ".quantized"
# In the manifest of the output: that of the run that chose its codes.
QUANTIZED = "quantized"


@dataclass(frozen=True)
class Serving:
    """A run for an engine, or for none.

    Args:
        target: None for a checkpoint in our own format.
        decoder: the model.
        fixed: the user named the scheme, so it is not replaced by one that does.
    """

    target: Target | None
    decoder: StreamedDecoder
    fixed: bool = True

    def fitted(self, config: LowbitConfig) -> LowbitConfig:
        """Returns `config`, its scheme replaced where nobody chose it and the engine refuses it.

        Raises:
            LowbitError: if the engine would not serve the result, with what would do.
        """
        if self.target is None:
            return config
        given = self._given(config)
        if not self.fixed and not config.dynamic:
            return self._chosen(config, given)
        self.target.serve(given)
        return config

    def _chosen(self, config: LowbitConfig, given: Given) -> LowbitConfig:
        """Returns `config` with the scheme nearest to its own that is served as it is."""
        assert self.target is not None
        usual = Scheme.parse(config.scheme)
        scheme = self.target.scheme(usual, given)
        given, layout = with_scheme(given, scheme), self.target.layouts[0]
        reasons = self.target.verdict(given, layout).findings
        nearest = self.target.nearest(given, layout) if reasons else scheme
        if nearest is None:
            self.target.serve(given)
            raise AssertionError(f"{self.target}: {layout} is refused and is not")
        if reasons:
            why = f"for {scheme} would be refused ({self.target.shown(reasons)})"
        else:
            why = f"for the engine casts scales to the dtype of the model ({given.model.dtype})"
        if nearest != usual:
            warnings.warn(f"{self.target}: the scheme is {nearest}, {why}", stacklevel=4)
        return _with_scheme(config, nearest)

    def allowed(self, allocation: Allocation, config: LowbitConfig) -> Allocation:
        """Returns `allocation` with the options that the engine serves.

        Raises:
            LowbitError: if it serves none, or not one that the user named.
        """
        if self.target is None:
            return allocation
        layout = self.target.layouts[0]
        if not allocation.fused and any(
            limit.kind == "fused" for limit in self.target.engine.formats[layout]
        ):
            raise LowbitError(
                f"{self.target}: {self.target.engine.name} multiplies q, k and v (gate and up) as "
                "one, so they need one scheme; leave --unfused out"
            )
        given = self._given(config)
        refused = {
            scheme: reasons
            for scheme in allocation.schemes
            if (reasons := self.target.verdict(with_scheme(given, scheme), layout).findings)
        }
        if not refused:
            return allocation
        first, reasons = next(iter(refused.items()))
        kept = tuple(scheme for scheme in allocation.schemes if scheme not in refused)
        if allocation.options != OPTIONS or not kept:
            what = f"no option is served, not even {first}" if not kept else f"the option {first}"
            raise LowbitError(f"{self.target}: {what}: {self.target.shown(reasons)}")
        left = ", ".join(str(scheme) for scheme in refused)
        warnings.warn(
            f"{self.target}: {left} are left out of the choice ({self.target.shown(reasons)})",
            stacklevel=3,
        )
        return dataclasses.replace(allocation, options=kept)

    def layout(self, config: LowbitConfig) -> str:
        """Returns the format of the output, after saying what is not known of the engine.

        Raises:
            LowbitError: if the engine would not serve it.
        """
        if self.target is None:
            return Lowbit.name
        served = self.target.serve(self._given(config))
        for sentence in served.unknown:
            warnings.warn(sentence, stacklevel=3)
        return served.layout

    def execute(
        self, plan: Plan, layout: str, resume: bool, verify: bool, progress: bool
    ) -> QuantizedCheckpoint:
        """Returns the finished checkpoint of `plan`, in the format `layout`.

        Only a GGUF file is verified here, if it is to be; what is in a folder is checked by whoever
        asked for it.
        """
        from lowbit.pipeline.plan import QuantizedCheckpoint

        if layout == Lowbit.name:
            return plan.execute(resume, progress)
        from lowbit.formats.conversion import convert
        from lowbit.formats.gguf.writing import GgufOptions

        output, staging = plan.directory, staging_of(plan.directory)
        finished = _finished(output)
        if resume and finished is not None and not staging.exists():
            return _again(plan, output, finished)
        quantized = dataclasses.replace(plan, directory=staging).execute(resume, progress)
        is_file = layout == Gguf.name
        if is_file:
            # The card is written with the file, and is of the model.
            origin = {ORIGIN: origin_of(plan.decoder.checkpoint.path)}
            write_json(staging / MANIFEST_NAME, {**quantized.manifest, **origin})
        made = convert(
            staging,
            output,
            layout,
            # Q4_1 has scale times zero point in fp16, which holds most of them only nearly.
            requantize=is_file,
            resume=resume and not is_file,
            verify=verify and is_file,
            progress=progress,
            # Where a run was interrupted in checking the file, it is made again: only then is known
            # what every weight of it has to be.
            gguf=GgufOptions(replace=resume) if is_file else None,
        )
        # Made of the model, not of the folder beside the output.
        own = {key: value for key, value in made.manifest.items() if is_file or key != ORIGIN}
        manifest = {**own, QUANTIZED: quantized.manifest}
        if not is_file:
            write_json(made.path / MANIFEST_NAME, manifest)
        shutil.rmtree(staging)
        return QuantizedCheckpoint(made.path, manifest)

    def _given(self, config: LowbitConfig) -> Given:
        selected = select_modules(self.decoder.model, config.selection())
        model = dataclasses.replace(
            described(self.decoder.model), dtype=dtype_of(self.decoder.checkpoint.config)
        )
        return Given.of_model("", selected, model)


def staging_of(output: Path) -> Path:
    """Returns the folder beside the output that holds the codes until they have their format."""
    return output.with_name(output.name + STAGING)


def check_output(checkpoint: Checkpoint, output: Path, target: Target | None, resume: bool) -> None:
    """Refuses a model that is quantized already, and an output that is not free for this run.

    Args:
        checkpoint: the model.
        output: the folder or file that the user named.
        target: None for a checkpoint in our own format.
        resume: go on with an interrupted run.

    Raises:
        LowbitError: saying what is there.
    """
    from lowbit.formats.gguf.writing import file_of, require_free

    layout = Lowbit.name if target is None else target.layouts[0]
    staging = staging_of(output)
    unfinished = layout != Lowbit.name and staging.is_dir() and any(staging.iterdir())
    if unfinished and not resume:
        raise LowbitError(
            f"{output}: holds an unfinished run (what is finished is kept in {staging}); add "
            "--resume to go on with it"
        )
    if layout != Gguf.name:
        check_places(checkpoint, output, resume)
        return
    check_places(checkpoint, staging, resume)
    require_free(file_of(output), str(staging) if unfinished else None)


def _with_scheme(config: LowbitConfig, scheme: Scheme) -> LowbitConfig:
    """Returns `config` with another scheme."""
    return LowbitConfig(
        scheme=scheme,
        dynamic=config.dynamic,
        modules_to_not_convert=config.modules_to_not_convert,
        quantize_lm_head=config.quantize_lm_head,
        quantize_embeddings=config.quantize_embeddings,
        algorithm=config.algorithm,
        algorithm_options=config.algorithm_options,
        recipe=config.recipe,
    )


def _finished(output: Path) -> dict[str, Any] | None:
    """Returns the manifest of the run that chose the codes of a finished output, if there is one.

    `stored_run` checks the fields of a manifest.
    """
    if (output / JOURNAL_NAME).exists() or not (output / MANIFEST_NAME).exists():
        return None
    stored = stored_run(output) or {}
    quantized = stored.get(QUANTIZED)
    return stored if isinstance(quantized, dict) else None


def _again(plan: Plan, output: Path, manifest: dict[str, Any]) -> QuantizedCheckpoint:
    """Returns a finished output, if it is of this very run."""
    from lowbit.pipeline.plan import QuantizedCheckpoint

    fingerprint = plan.fingerprint(plan.decoder.checkpoint.verify(lambda _: None))
    if manifest[QUANTIZED].get("fingerprint") != fingerprint:
        raise LowbitError(
            f"{output}: holds the finished result of another run; choose another output"
        )
    return QuantizedCheckpoint(output, manifest)
