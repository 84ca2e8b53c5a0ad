"""Running statistics of the inputs of linear layers: what calibration keeps of the activations.

Only H = mean of x x^T is kept, `[in_features, in_features]` in fp32 whatever the number of tokens.
It is a mean and not a sum so that it does not grow with the calibration set; the factor 2 of the
GPTQ paper is left out because damping is relative to H.
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
        self._finished: Statistics | None = None

    def add(self, x: Tensor) -> None:
        """Adds the input vectors of `x` `[..., in_features]`, any float dtype.

        A vector whose squared norm is not finite in fp32 (a NaN, an infinity, a square that
        overflows) would destroy H: it is left out and counted in `dropped`.

        Raises:
            RuntimeError: after `statistics()`, which gave H away.
        """
        if self._finished is not None:
            raise RuntimeError("statistics() was called: H is shared now and must not change")
        if x.shape[-1] != self.in_features:
            raise LowbitError(
                f"calibration: got inputs of {x.shape[-1]} features, expected {self.in_features}"
            )
        size = TOKENS_PER_CHUNK if self._hessian.device.type == "cpu" else LARGE_CHUNK
        for chunk in x.detach().reshape(-1, self.in_features).split(size):
            x_TK = chunk.to(self._hessian.device)
            finite = x_TK.float().square().sum(-1).isfinite()
            kept = int(finite.sum())
            self.dropped += x_TK.shape[0] - kept
            if kept == 0:
                continue
            if kept < x_TK.shape[0]:
                x_TK = x_TK[finite]
            self._add_product(x_TK, self.tokens, self.tokens + kept)
            self.tokens += kept

    def _add_product(self, inputs: Tensor, before: int, after: int) -> None:
        """Makes H, a mean over `before` tokens, one over `after`; `inputs` are `[tokens, K]`."""
        if inputs.device.type == "cuda" and inputs.dtype in (torch.bfloat16, torch.float16):
            # Tensor cores multiply 16 bits exactly and sum in fp32: nothing is lost against fp32,
            # and it takes a tenth of the time.
            product = torch.mm(inputs.T, inputs, out_dtype=torch.float32)
            self._hessian.mul_(before / after).add_(product, alpha=1 / after)
            return
        inputs = inputs.float()
        self._hessian.addmm_(inputs.T, inputs, beta=before / after, alpha=1 / after)

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
            self._finished = Statistics(self._hessian, self.tokens, self.dropped)
        return self._finished
