"""Pure tensor numerics: packing, grids, double quantization, activations. No Hugging Face."""

from lowbit.quant.activations import integer_product, quantize_activations
from lowbit.quant.grid import Grid, decode, nearest_code, sorted_codebook
from lowbit.quant.packing import pack, unpack
from lowbit.quant.qweight import QuantizedWeight, weight_checksum

__all__ = [
    "Grid",
    "QuantizedWeight",
    "decode",
    "integer_product",
    "nearest_code",
    "pack",
    "quantize_activations",
    "sorted_codebook",
    "unpack",
    "weight_checksum",
]
