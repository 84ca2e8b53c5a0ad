"""Modules with quantized weights. `nn.replace` swaps them into a model."""

from lowbit.nn.embedding import QuantEmbedding
from lowbit.nn.linear import QuantLinear, TiedQuantLinear
from lowbit.nn.prepared import kernels_of, prepare_model

__all__ = ["QuantEmbedding", "QuantLinear", "TiedQuantLinear", "kernels_of", "prepare_model"]
