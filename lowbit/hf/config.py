"""`quantization_config` of a checkpoint: the pipeline writes it, `from_pretrained` reads it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.algorithms import Algorithm, make_algorithm
from lowbit.errors import LowbitError, unknown_name
from lowbit.models.selection import Selection
from lowbit.scheme import Scheme

QUANT_METHOD = "lowbit"
FORMAT_VERSION = 1
IN_PROGRESS = "in progress"
_Choice = str | Scheme | None
_STORED_ONLY = ("quant_method", "format_version", "status", "manifest")


class LowbitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What is quantized how; with `from_pretrained(..., quantization_config=...)`, on the fly.

    Args:
        scheme: scheme of every linear layer of the decoder blocks, for example "W4A16_G64".
        dynamic: regex -> scheme, or None for 16 bits, as a mapping or as pairs; the first regex
            found in a module's name wins.
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
        dynamic: Mapping[str, _Choice] | Iterable[tuple[str, _Choice]] | None = None,
        modules_to_not_convert: Iterable[str] | None = None,
        quantize_lm_head: bool = False,
        quantize_embeddings: bool = False,
        algorithm: str = "rtn",
        algorithm_options: Mapping[str, Any] | None = None,
        **stored: Any,
    ) -> None:
        _require_known_keys(stored)
        _require_readable(stored)
        if isinstance(modules_to_not_convert, str):
            raise LowbitError(
                "modules_to_not_convert is a list of names, got the string "
                f"{modules_to_not_convert!r}; put it in brackets"
            )
        parsed = Scheme.parse(scheme)
        pairs = dynamic.items() if isinstance(dynamic, Mapping) else dynamic or ()
        self.quant_method = QUANT_METHOD
        self.format_version = FORMAT_VERSION
        self.scheme = str(parsed)
        # A list, because transformers sorts the keys of what it saves and the order counts.
        self.dynamic: list[tuple[str, str | None]] = [
            (pattern, None if choice is None else str(Scheme.parse(choice)))
            for pattern, choice in pairs
        ]
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.quantize_lm_head = quantize_lm_head
        self.quantize_embeddings = quantize_embeddings
        self.algorithm = algorithm
        self.algorithm_options = dict(algorithm_options or {})
        self.manifest = stored.get("manifest")
        for key, value in _derived(parsed).items():
            if stored.get(key, value) != value:
                raise LowbitError(
                    f"{key}={stored[key]!r} disagrees with scheme {self.scheme}; it is only a copy "
                    "for other readers, change the scheme (for example W3A16_G64)"
                )
            setattr(self, key, value)

    @staticmethod
    def from_selection(selection: Selection, **keys: Any) -> LowbitConfig:
        """Returns the config that makes loading select what `selection` selects.

        Args:
            selection: the user's choice.
            **keys: `algorithm`, `algorithm_options`, `manifest`.
        """
        return LowbitConfig(
            scheme=selection.scheme,
            dynamic=selection.dynamic,
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
                for pattern, text in self.dynamic
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


def _derived(scheme: Scheme) -> dict[str, Any]:
    """Returns what other readers look for; here, the scheme is what counts."""
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size or -1,  # -1: one group per channel, as GPTQ writes it
        "sym": scheme.symmetric,
        "desc_act": False,
    }


def _require_known_keys(stored: Mapping[str, Any]) -> None:
    known = {*_STORED_ONLY, *_derived(Scheme())}
    unknown = sorted(stored.keys() - known)
    if unknown:
        own = set(inspect.signature(LowbitConfig).parameters) - {"stored"}
        raise unknown_name("quantization_config key", unknown[0], known | own)


def _require_readable(stored: Mapping[str, Any]) -> None:
    version = stored.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise LowbitError(
            f"the checkpoint has lowbit format version {version}, this lowbit reads version "
            f"{FORMAT_VERSION}; upgrade with `pip install -U lowbit`"
        )
    if stored.get("status") == IN_PROGRESS:
        raise LowbitError(
            "the checkpoint is unfinished, its quantization was interrupted; resume it with "
            "`lowbit quantize ... --resume`"
        )
