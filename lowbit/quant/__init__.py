"""Pure tensor numerics: packing, grids, double quantization. No Hugging Face, no modules."""

from lowbit.quant.grid import Grid, decode, nearest_code, sorted_codebook
from lowbit.quant.packing import pack, unpack
from lowbit.quant.qweight import QuantizedWeight

__all__ = ["Grid", "QuantizedWeight", "decode", "nearest_code", "pack", "sorted_codebook", "unpack"]
