"""Running statistics of the inputs of linear layers: what calibration keeps of the activations.

Only H = mean of x x^T is kept, `[in_features, in_features]` in fp32 whatever the number of tokens.
It is a mean and not a sum so that it does not grow with the calibration set; the factor 2 of the
GPTQ paper is left out because damping is relative to H. Where the full-precision model runs beside
the quantized one, the mean of x_ref x^T over the same tokens is kept as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.algorithms.base import Statistics
from lowbit.errors import LowbitError

MAX_DROPPED_FRACTION = 0.01
# The fp32 copy of a chunk of tokens: 90 MB at 11008 features, small beside H (485 MB).
TOKENS_PER_CHUNK = 2048
# On a GPU every chunk also reads and writes H a few times, at 14336 features as long as the product
# of 2048 tokens itself takes. This is more than calibration passes at once.
LARGE_CHUNK = 8192


class HessianAccumulator:
    """Accumulates H = mean of x x^T over tokens.

    Args:
        in_features: length of an input vector.
        device: where H lives; inputs are moved there chunk by chunk.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.in_features = in_features
        self.tokens = 0
        self.dropped = 0
        self._hessian = torch.zeros(in_features, in_features, device=device)
        self._cross: Tensor | None = None
        self._finished: Statistics | None = None

    def add(self, x: Tensor, reference: Tensor | None = None) -> None:
        """Adds the input vectors of `x` `[..., in_features]`, any float dtype.

        A vector whose squared norm is not finite in fp32 (a NaN, an infinity, a square that
        overflows) would destroy H: it is left out and counted in `dropped`.

        Args:
            x: the inputs.
            reference: what the full-precision model has in their place, shaped like `x`; given
                with every call or with none. A token that is left out of one is left out of both.

        Raises:
            LowbitError: for inputs of another width, or a reference of other tokens.
            RuntimeError: after `statistics()`, which gave H away.
        """
        if self._finished is not None:
            raise RuntimeError("statistics() was called: H is shared now and must not change")
        if x.shape[-1] != self.in_features:
            raise LowbitError(
                f"calibration: got inputs of {x.shape[-1]} features, expected {self.in_features}"
            )
        if reference is not None and reference.shape != x.shape:
            raise LowbitError(
                f"calibration: the full-precision model sends {list(reference.shape)} to a layer "
                f"that receives {list(x.shape)} here, so their tokens cannot be compared; turn "
                "the correction of input mismatch off"
            )
        if self.tokens and (reference is None) != (self._cross is None):
            raise RuntimeError("a reference was given with some inputs and not with others")
        if reference is not None and self._cross is None:
            self._cross = torch.zeros_like(self._hessian)
        size = TOKENS_PER_CHUNK if self._hessian.device.type == "cpu" else LARGE_CHUNK
        inputs = x.detach().reshape(-1, self.in_features).split(size)
        if reference is None:
            for chunk in inputs:
                self._add_chunk(chunk, None)
            return
        others = reference.detach().reshape(-1, self.in_features).split(size)
        for chunk, other in zip(inputs, others, strict=True):
            self._add_chunk(chunk, other)

    def _add_chunk(self, chunk: Tensor, reference: Tensor | None) -> None:
        """Adds the input vectors `[tokens, K]` of one chunk."""
        device = self._hessian.device
        x_TK = chunk.to(device)
        ref_TK = None if reference is None else reference.to(device)
        finite = x_TK.float().square().sum(-1).isfinite()
        if ref_TK is not None:
            finite &= ref_TK.float().square().sum(-1).isfinite()
        kept = int(finite.sum())
        self.dropped += x_TK.shape[0] - kept
        if kept == 0:
            return
        if kept < x_TK.shape[0]:
            x_TK = x_TK[finite]
            ref_TK = None if ref_TK is None else ref_TK[finite]
        before, after = self.tokens, self.tokens + kept
        _update_mean(self._hessian, x_TK, x_TK, before, after)
        if ref_TK is not None and self._cross is not None:
            _update_mean(self._cross, ref_TK, x_TK, before, after)
        self.tokens = after

    def statistics(self) -> Statistics:
        """Returns the statistics, the same object at every call; nothing can be added afterwards.

        Raises:
            LowbitError: if nothing was added, or more than 1% of the vectors were not finite.
        """
        seen = self.tokens + self.dropped
        if seen == 0:
            raise LowbitError(
                f"calibration: a layer of {self.in_features} input features saw no token; add "
                "calibration text, or use an algorithm without statistics for this layer"
            )
        if self.dropped > MAX_DROPPED_FRACTION * seen:
            raise LowbitError(
                f"calibration: {self.dropped} of {seen} input vectors of {self.in_features} "
                "features are not finite (at most 1% may be); if the model ran in float16, use "
                "bfloat16 or float32"
            )
        if self._finished is None:
            self._finished = Statistics(self._hessian, self.tokens, self.dropped, cross=self._cross)
        return self._finished


def _update_mean(mean: Tensor, left: Tensor, right: Tensor, before: int, after: int) -> None:
    """Makes `mean` of left^T right, over `before` tokens, one over `after`; both `[tokens, K]`."""
    if right.device.type == "cuda" and right.dtype in (torch.bfloat16, torch.float16):
        # Tensor cores multiply 16 bits exactly and sum in fp32: nothing is lost against fp32,
        # and it takes a tenth of the time.
        product = torch.mm(left.T, right, out_dtype=torch.float32)
        mean.mul_(before / after).add_(product, alpha=1 / after)
        return
    mean.addmm_(left.float().T, right.float(), beta=before / after, alpha=1 / after)
