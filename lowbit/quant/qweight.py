"""A quantized weight as it is stored, and its way back to floats."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quant.double_quant import DoubleQuantizedScales
from lowbit.quant.grid import Grid
from lowbit.quant.packing import pack, unpack
from lowbit.scheme import INT8_STATIC, Scheme

# Decoding makes several fp32 copies of what it decodes, so rows are decoded a block at a time;
# they do not depend on each other, so the result is the same bit for bit. On a CPU a block of 1
# MiB per copy stays in the cache: ten times faster than a whole [2816, 1024] at once, and nothing
# is allocated that the C library would fetch from the system anew. Elsewhere few large steps are
# better.
BLOCK_WEIGHTS = {"cpu": 1 << 18}
LARGE_BLOCK = 1 << 24


@dataclass(frozen=True)
class QuantizedWeight:
    """The stored tensors of one weight `[out_features, in_features]`.

    Args:
        scheme: what the tensors mean.
        in_features: columns of the weight (the packed row is padded to a word).
        packed: int32 `[out_features, words]`, see `quant/packing.py`.
        scale: scale dtype `[out_features, groups]`, or uint8 codes under double quantization.
        zero_point: int32 `[ceil(out_features * bits / 32), groups]`, packed along out_features.
        scale_offset: bf16 `[blocks]`, see `quant/double_quant.py`.
        scale_step: bf16 `[blocks]`.
        input_scale: float32 `[1]`, the scale of the activations; with `int8_static` only.
    """

    scheme: Scheme
    in_features: int
    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    scale_offset: Tensor | None = None
    scale_step: Tensor | None = None
    input_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.packed.shape[0], self.in_features

    @staticmethod
    def from_codes(codes: Tensor, grid: Grid, input_scale: Tensor | None = None) -> QuantizedWeight:
        """Returns the packed form of int8 `codes` `[out_features, in_features]` on `grid`.

        Args:
            codes: int8 `[out_features, in_features]`.
            grid: the values they stand for.
            input_scale: float32 `[1]`, for a scheme with calibrated activations and for no other.

        Raises:
            LowbitError: if `input_scale` is missing or not wanted.
        """
        scheme, dq = grid.scheme, grid.double_quantized
        if (input_scale is not None) != (scheme.activations == INT8_STATIC):
            raise LowbitError(
                f"scheme {scheme} needs a calibrated input_scale; give calibration text, or use "
                "W8A8, which computes one per token"
                if input_scale is None
                else f"scheme {scheme} stores no input_scale, but one was given"
            )
        zero_point = None
        if grid.zeros is not None:
            zeros_GN = grid.zeros.to(torch.int8).T
            zero_point = pack(zeros_GN, scheme.bits).T.contiguous()
        return QuantizedWeight(
            scheme=scheme,
            in_features=codes.shape[1],
            packed=pack(codes, scheme.bits),
            scale=dq.codes if dq else grid.scales.to(scheme.torch_scale_dtype),
            zero_point=zero_point,
            scale_offset=dq.offset if dq else None,
            scale_step=dq.step if dq else None,
            input_scale=input_scale,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Returns the stored tensors by the names of `Scheme.tensor_specs`."""
        named = {
            "weight_packed": self.packed,
            "weight_scale": self.scale,
            "weight_shape": torch.tensor(self.shape, dtype=torch.int64),
            "weight_zero_point": self.zero_point,
            "weight_scale_offset": self.scale_offset,
            "weight_scale_step": self.scale_step,
            "input_scale": self.input_scale,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @staticmethod
    def from_tensors(
        scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, Tensor], name: str = "weight"
    ) -> QuantizedWeight:
        """Returns the weight that `tensors` hold, after checking every shape and dtype.

        Raises:
            LowbitError: naming the tensor that is missing or does not fit the scheme.
        """
        for suffix, (size, dtype) in scheme.tensor_specs(shape).items():
            found = tensors.get(suffix)
            if found is None:
                raise LowbitError(f"{name}: scheme {scheme} needs the tensor {suffix}, not found")
            if tuple(found.shape) != size or found.dtype != dtype:
                raise LowbitError(
                    f"{name}: {suffix} is {found.dtype} {list(found.shape)}, but scheme {scheme} "
                    f"of a {list(shape)} weight needs {dtype} {list(size)}"
                )
        return QuantizedWeight(
            scheme=scheme,
            in_features=shape[1],
            packed=tensors["weight_packed"],
            scale=tensors["weight_scale"],
            zero_point=tensors.get("weight_zero_point"),
            scale_offset=tensors.get("weight_scale_offset"),
            scale_step=tensors.get("weight_scale_step"),
            input_scale=tensors.get("input_scale"),
        )

    def padding_is_zero(self) -> bool:
        """Returns True if no bit is set beyond the last code of a row, as `pack` leaves it.

        Then `codes()`, packed again, are the same tensors bit for bit.
        """
        bits = self.scheme.bits
        clean = _tail_is_zero(self.packed, self.in_features * bits)
        if clean and self.zero_point is not None:
            clean = _tail_is_zero(self.zero_point.T, self.shape[0] * bits)
        return clean

    def codes(self) -> Tensor:
        """Returns the int8 codes `[out_features, in_features]`."""
        return unpack(self.packed, self.scheme.bits, self.in_features)

    def grid(self, rows: Tensor | None = None) -> Grid:
        """Returns the scales and zero points, decoded to float32.

        Args:
            rows: int64 `[n]`, the rows to decode; None decodes all.
        """
        scheme, dq = self.scheme, None
        if scheme.double_quant:
            assert self.scale_offset is not None
            assert self.scale_step is not None
            dq = DoubleQuantizedScales(
                self.scale, self.scale_offset, self.scale_step, scheme.signed_scales
            )
            scales = dq.decode(scheme.torch_scale_dtype, rows)
        else:
            scales = (self.scale if rows is None else self.scale[rows]).float()
        zeros = None
        if self.zero_point is not None:
            # Packed along the rows, so they are unpacked together: one per group, not per weight.
            zeros = unpack(self.zero_point.T, scheme.bits, self.shape[0]).T
            zeros = (zeros if rows is None else zeros[rows]).float()
        return Grid(scheme, self.in_features, scales, zeros, dq)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the weights `[out_features, in_features]`, computed in fp32, cast once."""
        device = self.packed.device
        step = max(1, BLOCK_WEIGHTS.get(device.type, LARGE_BLOCK) // self.in_features)
        grid = self.grid()
        if step >= self.shape[0]:
            return grid.dequantize(self.codes()).to(dtype)
        weight = torch.empty(self.shape, dtype=dtype, device=device)
        for rows in torch.split(torch.arange(self.shape[0], device=device), step):
            codes = unpack(self.packed[rows], self.scheme.bits, self.in_features)
            weight[rows] = grid.rows(rows).dequantize(codes).to(dtype)
        return weight

    def checksum(self) -> str:
        """Returns the `weight_checksum` of `dequantize()`, a few rows in memory at a time."""
        stored: dict[str, Any] = {k: t for k, t in vars(self).items() if isinstance(t, Tensor)}
        here = replace(self, **{name: tensor.cpu() for name, tensor in stored.items()})
        step = max(1, BLOCK_WEIGHTS["cpu"] // self.in_features)
        starts = range(0, self.shape[0], step)
        rows = (torch.arange(start, min(start + step, self.shape[0])) for start in starts)
        grid = here.grid()
        return weight_checksum(
            grid.rows(r).dequantize(unpack(here.packed[r], self.scheme.bits, self.in_features))
            for r in rows
        )

    def dequantize_rows(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the weights of `rows` (int64 `[n]`) alone, `[n, in_features]` (embeddings)."""
        codes = unpack(self.packed[rows], self.scheme.bits, self.in_features)
        return self.grid(rows).dequantize(codes).to(dtype)


def weight_checksum(rows: Iterable[Tensor]) -> str:
    """Returns the CRC-32 of a weight, 8 hex digits: the same in every format that holds its values.

    Args:
        rows: float32 `[n, in_features]`, all of its rows in order; signs of zero do not count.
    """
    crc = 0
    for block in rows:
        # -0.0 + 0.0 is 0.0
        crc = zlib.crc32((block.float() + 0.0).contiguous().numpy().data, crc)
    return f"{crc:08x}"


def _tail_is_zero(words: Tensor, used_bits: int) -> bool:
    """Returns True if the int32 rows `words` are zero beyond their first `used_bits` bits."""
    in_last = used_bits % 32
    # The mask of the unused bits is negative: it has the top bit.
    return in_last == 0 or not bool((words[:, -1] & -(1 << in_last)).any())
