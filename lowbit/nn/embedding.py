"""An embedding whose table is stored in few bits; only the rows that are asked for are decoded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit import ops
from lowbit.nn.stored import StoredWeight
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme


class QuantEmbedding(StoredWeight, nn.Embedding):  # type: ignore[override] # `weight` is decoded
    """A table of `num_embeddings` quantized rows.

    Args:
        num_embeddings: rows.
        embedding_dim: columns.
        scheme: how the table is stored.
        compute_dtype: dtype of the result.
        padding_idx: as in `nn.Embedding`; it matters to training only and is kept for readers.
        embed_scale: Gemma's factor on every row, None for an ordinary embedding.
        device: where the uninitialised tensors are made.
    """

    plain_class = nn.Embedding
    multiplies = False  # unless an output head shares the table

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme,
        compute_dtype: torch.dtype = torch.bfloat16,
        padding_idx: int | None = None,
        embed_scale: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.scalar_embed_scale = padding_idx, embed_scale
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._create_stored(scheme, (num_embeddings, embedding_dim), compute_dtype, device)

    @staticmethod
    def from_quantized(
        qweight: QuantizedWeight,
        compute_dtype: torch.dtype = torch.bfloat16,
        padding_idx: int | None = None,
        embed_scale: float | None = None,
    ) -> QuantEmbedding:
        """Returns the embedding that holds the tensors of `qweight` themselves."""
        module = QuantEmbedding(
            *qweight.shape, qweight.scheme, compute_dtype, padding_idx, embed_scale, "meta"
        )
        module._fill_stored(qweight)
        return module

    def forward(self, ids: Tensor) -> Tensor:
        """Returns `[*ids.shape, embedding_dim]` in the compute dtype."""
        rows = ops.embedding(ids, self.operand, self.compute_dtype)
        if self.scalar_embed_scale is None:
            return rows
        # Gemma rounds the factor to the dtype of the table first: 8.0 is exact, sqrt(2304) is not.
        return rows * torch.tensor(self.scalar_embed_scale, dtype=rows.dtype, device=rows.device)

    def extra_repr(self) -> str:
        """Returns sizes and scheme for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme}"
