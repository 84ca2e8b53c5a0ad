"""`quantization_config` of a checkpoint: the pipeline writes it, `from_pretrained` reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.algorithms import ALGORITHMS, Algorithm, make_algorithm
from lowbit.errors import LowbitError, unknown_name
from lowbit.models.selection import Selection
from lowbit.scheme import Scheme

QUANT_METHOD = "lowbit"
FORMAT_VERSION = 1
IN_PROGRESS = "in progress"
# Written for other readers, which look for them; `scheme` is what counts.
_DERIVED = ("bits", "group_size", "sym", "desc_act")


class LowbitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What is quantized how; with `from_pretrained(..., quantization_config=...)`, on the fly.

    Args:
        scheme: scheme of every linear layer of the decoder blocks, for example "W4A16_G64".
        dynamic: regex -> scheme, or None for 16 bits; the first regex found in a name wins.
        modules_to_not_convert: names, or dotted parts of names, that stay in 16 bits.
        quantize_lm_head: also the output head.
        quantize_embeddings: also the input embedding, with a head that is tied to it.
        algorithm: for quantizing while loading; one that needs no calibration data.
        algorithm_options: its options.
        **stored: what a saved config has besides: `quant_method`, `format_version`, the keys
            derived from `scheme`, `status` and `manifest`.

    Raises:
        LowbitError: for unknown keys, a newer format, an unfinished checkpoint.
    """

    def __init__(
        self,
        scheme: str | Scheme = "W4A16",
        dynamic: Mapping[str, str | Scheme | None] | None = None,
        modules_to_not_convert: Iterable[str] | None = None,
        quantize_lm_head: bool = False,
        quantize_embeddings: bool = False,
        algorithm: str = "rtn",
        algorithm_options: Mapping[str, Any] | None = None,
        **stored: Any,
    ) -> None:
        known = {*_DERIVED, "quant_method", "format_version", "status", "manifest"}
        unknown = sorted(stored.keys() - known)
        if unknown:
            own = {"scheme", "dynamic", "modules_to_not_convert", "quantize_lm_head",
                   "quantize_embeddings", "algorithm", "algorithm_options"}  # fmt: skip
            raise unknown_name("quantization_config key", unknown[0], known | own)
        _require_readable(stored)
        parsed = Scheme.parse(scheme)
        schemes = {k: None if v is None else Scheme.parse(v) for k, v in (dynamic or {}).items()}
        self.quant_method = QUANT_METHOD
        self.format_version = FORMAT_VERSION
        self.scheme = str(parsed)
        self.dynamic = {k: None if v is None else str(v) for k, v in schemes.items()}
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.quantize_lm_head = quantize_lm_head
        self.quantize_embeddings = quantize_embeddings
        self.algorithm = algorithm
        self.algorithm_options = dict(algorithm_options or {})
        self.bits = parsed.bits
        self.group_size = parsed.group_size or -1  # -1: one group per channel, as GPTQ writes it
        self.sym = parsed.symmetric
        self.desc_act = False
        self.manifest = stored.get("manifest")
        if algorithm not in ALGORITHMS:
            raise unknown_name("algorithm", algorithm, ALGORITHMS)

    @staticmethod
    def from_selection(selection: Selection, **keys: Any) -> LowbitConfig:
        """Returns the config that makes loading select what `selection` selects.

        Args:
            selection: the user's choice.
            **keys: `algorithm`, `algorithm_options`, `manifest`.
        """
        return LowbitConfig(
            scheme=selection.scheme,
            dynamic=dict(selection.dynamic),
            modules_to_not_convert=selection.modules_to_not_convert,
            quantize_lm_head=selection.quantize_lm_head,
            quantize_embeddings=selection.quantize_embeddings,
            **keys,
        )

    def selection(self) -> Selection:
        """Returns the user's choice that this config records."""
        return Selection(
            scheme=Scheme.parse(self.scheme),
            dynamic=tuple(
                (pattern, None if text is None else Scheme.parse(text))
                for pattern, text in self.dynamic.items()
            ),
            modules_to_not_convert=tuple(self.modules_to_not_convert),
            quantize_lm_head=self.quantize_lm_head,
            quantize_embeddings=self.quantize_embeddings,
        )

    def data_free_algorithm(self) -> Algorithm:
        """Returns the algorithm for quantizing while loading.

        Raises:
            LowbitError: if it needs calibration data, which loading does not have.
        """
        algorithm = make_algorithm(self.algorithm, **self.algorithm_options)
        if algorithm.needs_statistics:
            raise LowbitError(
                f"algorithm {self.algorithm!r} needs calibration data and cannot quantize while "
                "loading; run `lowbit quantize` and load its output, or use algorithm='rtn'"
            )
        return algorithm

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form; `manifest` only where there is one."""
        values: dict[str, Any] = super().to_dict()
        if values["manifest"] is None:
            del values["manifest"]
        return values


def sentinel_key(selected_names: Iterable[str]) -> str:
    """Returns the name of the 0-element uint8 tensor that every lowbit checkpoint holds.

    transformers without lowbit would only warn about `weight_packed` and leave the weights random.
    It does compare shapes: a `weight` of no elements makes it stop.

    Args:
        selected_names: the quantized modules in the order of `select_modules`.
    """
    return f"{next(iter(selected_names))}.weight"


def _require_readable(stored: Mapping[str, Any]) -> None:
    version = stored.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise LowbitError(
            f"the checkpoint has lowbit format version {version}, this lowbit reads "
            f"{FORMAT_VERSION}; upgrade with `pip install -U lowbit`"
        )
    if stored.get("status") == IN_PROGRESS:
        raise LowbitError(
            "the checkpoint is unfinished, its quantization was interrupted; resume it with "
            "`lowbit quantize ... --resume`"
        )
