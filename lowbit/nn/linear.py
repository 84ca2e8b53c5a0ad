"""A linear layer whose weight is stored in few bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit import ops
from lowbit.backends import PreparedWeight
from lowbit.errors import LowbitError
from lowbit.nn.embedding import QuantEmbedding
from lowbit.nn.stored import StoredWeight
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme


class QuantLinear(StoredWeight, nn.Linear):  # type: ignore[override] # `weight` is decoded
    """`x w^T + bias` with a quantized `w`; an `nn.Linear` for everything that looks for those.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        bias: whether there is a bias; it keeps 16 bits.
        scheme: how the weight is stored.
        compute_dtype: dtype of the bias and of the decoded weight.
        device: where the uninitialised tensors are made.
    """

    plain_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: Scheme,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._create_stored(scheme, (out_features, in_features), compute_dtype, device)
        empty = torch.empty(out_features, dtype=compute_dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))

    @staticmethod
    def from_quantized(
        qweight: QuantizedWeight,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype = torch.bfloat16,
    ) -> QuantLinear:
        """Returns the layer that holds the tensors of `qweight` and `bias` themselves."""
        out_features, in_features = qweight.shape
        layer = QuantLinear(in_features, out_features, False, qweight.scheme, compute_dtype, "meta")
        layer._fill_stored(qweight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(compute_dtype))
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Returns `[..., out_features]` in x's dtype for `x` `[..., in_features]`."""
        weight = self.operand
        if self._siblings is not None and self._tensors_are_its_own(weight):
            siblings, index = self._siblings
            together = siblings.linear(index, x, self.bias)
            if together is not None:
                return together
        return ops.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        """Returns sizes and scheme for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme}"
        )


class TiedQuantLinear(QuantLinear):
    """An output head that multiplies by the stored weight of the input embedding.

    It owns no weight, so the shared tensors are one entry in a state dict and stay shared whatever
    moves the model. (Two modules with the same buffers come apart at the first `.to(device)`.)

    Args:
        embedding: whose weight is used.
        bias: the head's own bias, or None.
    """

    def __init__(self, embedding: QuantEmbedding, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.scheme, self.logical_shape = embedding.scheme, embedding.logical_shape
        self.compute_dtype = embedding.compute_dtype
        self._is_hf_initialized = True
        # In a tuple, so that it is not registered as a submodule.
        self._tied_to = (embedding,)
        embedding.multiplies = True
        self.register_parameter("bias", bias)

    @property
    def operand(self) -> QuantizedWeight | PreparedWeight:
        """The embedding's weight as it is held."""
        return self._tied_to[0].operand

    @property
    def qweight(self) -> Tensor:
        """The embedding's codes as they are held."""
        return self._tied_to[0].qweight

    def prepare(self) -> bool:
        """Prepares the embedding's weight."""
        return self._tied_to[0].prepare()

    def round_activations(self, activations: str) -> None:
        """Multiplies from now on by "float" or by "int8" activations."""
        self._tied_to[0].round_activations(activations)

    def restore(self) -> None:
        """Goes back to the embedding's canonical tensors."""
        self._tied_to[0].restore()

    def forward(self, x: Tensor) -> Tensor:
        """Returns `[..., out_features]` in x's dtype and on x's device."""
        device = self.qweight.device
        if device.type == "meta" and not x.is_meta:
            raise LowbitError(
                "the output head shares its weight with an embedding that is offloaded; give a "
                "device_map that keeps the embedding on a device"
            )
        bias = None if self.bias is None else self.bias.to(device)
        # A split model may have the embedding elsewhere; hidden states are smaller than weights.
        return ops.linear(x.to(device), self.operand, bias).to(x.device)

    def _names(self) -> tuple[str, ...]:
        return ()
