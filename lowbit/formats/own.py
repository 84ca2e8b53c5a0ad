"""lowbit's own checkpoints, and 16 bits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint import Checkpoint
from lowbit.formats.base import StoredAs, Written
from lowbit.hf.config import QUANT_METHOD, LowbitConfig, sentinel_key
from lowbit.inventory import module_schemes
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme


class Lowbit:
    """The canonical tensors of `QuantizedWeight`, as they are."""

    name = "lowbit"
    holds_order = False

    def matches(self, quantization: Mapping[str, Any]) -> bool:
        """Returns whether the config is lowbit's."""
        return quantization.get("quant_method") == QUANT_METHOD

    def modules(self, checkpoint: Checkpoint) -> dict[str, StoredAs]:
        """Returns how every module is stored."""
        return {
            name: self.stored_as(
                name, scheme, shape, [f"{name}.{key}" for key in scheme.tensor_specs(shape)]
            )
            for name, (scheme, shape) in module_schemes(checkpoint).items()
        }

    def read(self, module: str, stored: StoredAs, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Returns the weight of a module."""
        named = {name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items()}
        return QuantizedWeight.from_tensors(stored.scheme, stored.shape, named, module)

    def refusal(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Returns None: it holds every scheme."""
        return None

    def nearest(self, scheme: Scheme, shape: tuple[int, int]) -> Scheme | None:
        """Returns `scheme`."""
        return scheme

    def held_as(self, scheme: Scheme) -> Scheme:
        """Returns `scheme`."""
        return scheme

    def tensors(
        self, module: str, qweight: QuantizedWeight, input_order: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns the tensors of a module."""
        return {f"{module}.{suffix}": tensor for suffix, tensor in qweight.tensors().items()}

    def stored_as(
        self, module: str, scheme: Scheme, shape: tuple[int, int], tensors: Iterable[str]
    ) -> StoredAs:
        """Returns how `tensors` are to be read back."""
        return StoredAs(scheme, shape, tuple(tensors))

    def config(self, written: Written) -> dict[str, Any]:
        """Returns the config: the most common scheme, and exceptions by name."""
        common = written.common
        config = LowbitConfig(
            scheme=common,
            dynamic=[
                (rf"^{re.escape(name)}$", scheme)
                for name, scheme in written.schemes.items()
                if scheme != common
            ],
            modules_to_not_convert=sorted(set(written.inner_plain)),
            quantize_lm_head=written.head in written.schemes,
            quantize_embeddings=written.embedding in written.schemes,
        ).to_dict()
        # Nothing says which algorithm chose the codes, so nothing is claimed.
        return {key: value for key, value in config.items() if not key.startswith("algorithm")}

    def markers(self, written: Written) -> dict[str, Tensor]:
        """Returns the tensor of no elements that makes loading without lowbit fail."""
        return {sentinel_key(written.schemes): torch.empty(0, dtype=torch.uint8)}


class Bf16:
    """No quantization: weights are decoded and rounded to bf16 once."""

    name = "bf16"
    holds_order = True

    def matches(self, quantization: Mapping[str, Any]) -> bool:
        """Returns whether there is no quantization."""
        return not quantization

    def modules(self, checkpoint: Checkpoint) -> dict[str, StoredAs]:
        """Returns nothing: no module is quantized."""
        return {}

    def read(self, module: str, stored: StoredAs, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Raises: nothing is quantized."""
        raise AssertionError(f"{module} is not quantized")

    def refusal(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Returns None: everything can be decoded."""
        return None

    def nearest(self, scheme: Scheme, shape: tuple[int, int]) -> Scheme | None:
        """Returns `scheme`."""
        return scheme

    def held_as(self, scheme: Scheme) -> Scheme:
        """Returns `scheme`."""
        return scheme

    def tensors(
        self, module: str, qweight: QuantizedWeight, input_order: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns the decoded weight."""
        weight = qweight.dequantize(torch.bfloat16)
        if input_order is not None:
            weight = weight[:, torch.argsort(input_order)]
        return {f"{module}.weight": weight}

    def stored_as(
        self, module: str, scheme: Scheme, shape: tuple[int, int], tensors: Iterable[str]
    ) -> StoredAs:
        """Raises: nothing is quantized."""
        raise AssertionError(f"{module} is not quantized")

    def config(self, written: Written) -> dict[str, Any]:
        """Returns no config."""
        return {}

    def markers(self, written: Written) -> dict[str, Tensor]:
        """Returns nothing: there are none."""
        return {}
