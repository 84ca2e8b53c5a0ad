"""`quantization_config` of a checkpoint: the pipeline writes it, `from_pretrained` reads it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.algorithms import Algorithm, make_algorithm
from lowbit.checkpoint.reader import IN_PROGRESS
from lowbit.errors import LowbitError, unknown_name
from lowbit.models.selection import Selection
from lowbit.scheme import INT8_STATIC, Scheme

QUANT_METHOD = "lowbit"
FORMAT_VERSION = 1
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
        recipe: what else was done, recorded by `lowbit quantize` (see `Recipe.surroundings`).
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
        recipe: Mapping[str, Any] | None = None,
        **stored: Any,
    ) -> None:
        _require_readable(stored)
        _require_known_keys(stored)
        parsed = Scheme.parse(scheme)
        pairs = _rules(dynamic)
        self.quant_method = QUANT_METHOD
        self.format_version = FORMAT_VERSION
        self.scheme = str(parsed)
        # A list, because transformers sorts the keys of what it saves and the order counts.
        self.dynamic: list[tuple[str, str | None]] = [
            (pattern, None if choice is None else str(Scheme.parse(choice)))
            for pattern, choice in pairs
        ]
        self.modules_to_not_convert = _names(modules_to_not_convert)
        self.quantize_lm_head = quantize_lm_head
        self.quantize_embeddings = quantize_embeddings
        self.algorithm = algorithm
        self.algorithm_options = dict(algorithm_options or {})
        self.recipe = dict(recipe) if recipe else None
        self.manifest = stored.get("manifest")
        self.selection()  # checks the regexes
        for key, value in _derived(parsed).items():
            if stored.get(key, value) != value:
                raise LowbitError(
                    f"{key}={stored[key]!r} disagrees with scheme {self.scheme}; it is only a copy "
                    "for other readers, change the scheme (for example W3A16_G64)"
                )
            setattr(self, key, value)

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

    @property
    def needs_activation_scales(self) -> bool:
        """True if any scheme stores a scale of activations, which only calibration finds."""
        selection = self.selection()
        schemes = [selection.scheme, *(scheme for _, scheme in selection.dynamic)]
        return any(scheme.activations == INT8_STATIC for scheme in schemes if scheme is not None)

    def data_free_algorithm(self) -> Algorithm:
        """Returns the algorithm for quantizing while loading.

        Raises:
            LowbitError: if it or a scheme needs calibration data, which loading does not have.
        """
        if self.needs_activation_scales:
            raise LowbitError(
                "W8A8_STATIC needs calibration data and cannot be had while loading; run `lowbit "
                "quantize` and load its output, or use W8A8, which computes a scale per token"
            )
        algorithm = make_algorithm(self.algorithm, **self.algorithm_options)
        if algorithm.needs_statistics:
            raise LowbitError(
                f"algorithm {self.algorithm!r} needs calibration data and cannot quantize while "
                "loading; run `lowbit quantize` and load its output, or use algorithm='rtn'"
            )
        return algorithm

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form; `manifest` and `recipe` only where there is one."""
        values: dict[str, Any] = super().to_dict()
        for key in ("manifest", "recipe"):
            if values[key] is None:
                del values[key]
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


def _rules(dynamic: Any) -> list[tuple[str, Any]]:
    """Returns the (regex, choice) pairs of `dynamic`, given as a mapping or as pairs."""
    pairs = list(dynamic.items()) if isinstance(dynamic, Mapping) else dynamic or []
    if not isinstance(pairs, (list, tuple)) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)
        for pair in pairs
    ):
        raise LowbitError(f"dynamic maps regexes to schemes or null, got {dynamic!r}")
    return [(pattern, choice) for pattern, choice in pairs]


def _names(modules: Any) -> list[str]:
    """Returns the names of `modules_to_not_convert`."""
    names = [] if modules is None else modules
    if not isinstance(names, (list, tuple, set)) or not all(isinstance(n, str) for n in names):
        raise LowbitError(f"modules_to_not_convert is a list of names, got {modules!r}")
    return list(names)


def _require_readable(stored: Mapping[str, Any]) -> None:
    version = stored.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        fix = "upgrade with `pip install -U lowbit`" if newer else "quantize the model again"
        raise LowbitError(
            f"the checkpoint has lowbit format version {version!r}, this lowbit reads version "
            f"{FORMAT_VERSION}; {fix}"
        )
    if stored.get("status") == IN_PROGRESS:
        raise LowbitError(
            "the checkpoint is unfinished, its quantization was interrupted; resume it with "
            "`lowbit quantize ... --resume`"
        )
