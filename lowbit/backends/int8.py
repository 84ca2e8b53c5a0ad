"""A stored weight for Triton's kernels of int8 codes and int8 activations. Import it late.

Tensor cores read codes as they are counted, int8 `[N, K]`: only the packing is undone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lowbit_kernels.gpu import w8a8
from torch import Tensor

from lowbit.backends.base import Joined, PreparedWeight
from lowbit.quant import QuantizedWeight, pack
from lowbit.scheme import Scheme


class Int8Prepared(PreparedWeight):
    """Codes and scales of a weight, and the scale of its activations if it has one.

    Args:
        scheme: how the weight is stored in a checkpoint.
        codes: int8 `[N, K]`.
        scale: scale dtype `[N]`.
        input_scale: float32 `[1]`, or None for a scale per token.
        activation_scale: the number in `input_scale`; kernels take it as one, and reading it from a
            GPU makes the host wait.
    """

    backend = "triton"

    def __init__(
        self,
        scheme: Scheme,
        codes: Tensor,
        scale: Tensor,
        input_scale: Tensor | None,
        activation_scale: float | None,
    ) -> None:
        self.scheme, self.codes, self.scale = scheme, codes, scale
        self.input_scale, self.activation_scale = input_scale, activation_scale
        self.shape = codes.shape[0], codes.shape[1]

    @staticmethod
    def of(qweight: QuantizedWeight) -> Int8Prepared:
        """Returns `qweight` unpacked, on its device."""
        input_scale = qweight.input_scale
        number = None if input_scale is None else float(input_scale)
        scale = qweight.scale.squeeze(1).contiguous()
        return Int8Prepared(qweight.scheme, qweight.codes(), scale, input_scale, number)

    @property
    def kernels(self) -> str:
        """The backend and the kind of its kernels."""
        return f"{self.backend} (int8)"

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by their names here."""
        named = {"codes": self.codes, "scale": self.scale, "input_scale": self.input_scale}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Int8Prepared:
        """Returns the same weight over `tensors`."""
        codes, scale, given = tensors["codes"], tensors["scale"], tensors.get("input_scale")
        return Int8Prepared(self.scheme, codes, scale, given, self.activation_scale)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Returns `x w^T + bias`, `[..., N]` in x's dtype."""
        return w8a8.w8a8_linear(x, self.codes, self.scale, bias, self.activation_scale)

    def grad_input(self, grad: Tensor) -> Tensor:
        """Returns `grad w`, `[..., K]` in grad's dtype."""
        result: Tensor = torch.ops.lowbit_kernels.w8a8_grad_input(grad, self.codes, self.scale)
        return result

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight `[N, K]` in `dtype`."""
        return (self.codes.float() * self.scale.float()[:, None]).to(dtype)

    def dequantize_rows(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the weights of `rows` (int64 `[n]`), `[n, K]` in `dtype`."""
        return (self.codes[rows].float() * self.scale[rows].float()[:, None]).to(dtype)

    def canonical(self) -> QuantizedWeight:
        """Returns the tensors that the weight was prepared from, bit for bit."""
        packed = pack(self.codes, self.scheme.bits)
        return QuantizedWeight(
            scheme=self.scheme,
            in_features=self.shape[1],
            packed=packed,
            scale=self.scale[:, None].clone(),
            input_scale=self.input_scale,
        )

    def join(self, others: Sequence[PreparedWeight]) -> Joined | None:
        """Returns all rows as one weight; None for another scheme, width or input scale."""
        parts = [part for part in (self, *others) if isinstance(part, Int8Prepared)]
        kinds = {(part.scheme, part.shape[1], part.activation_scale) for part in parts}
        if len(parts) <= len(others) or len(kinds) > 1:
            return None
        whole = self.with_tensors(
            {
                **self.tensors(),
                "codes": torch.cat([part.codes for part in parts]),
                "scale": torch.cat([part.scale for part in parts]),
            }
        )
        starts, views, start = [], [], 0
        for part in parts:
            rows = slice(start, start + part.shape[0])
            over = {**part.tensors(), "codes": whole.codes[rows], "scale": whole.scale[rows]}
            views.append(part.with_tensors(over))
            starts.append(start)
            start = rows.stop
        return Joined(whole, tuple(views), tuple(starts))
