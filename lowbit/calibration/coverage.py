"""Whether calibration holds enough tokens for the widest layer, and a warning where it does not."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

# Tokens for each input feature of a layer from which on more of them change little.
ENOUGH = 50


def warn_of_few_tokens(tokens: int, widths: Mapping[str, int]) -> None:
    """Warns once if the widest layer gets fewer than `ENOUGH` tokens for each input dimension.

    Args:
        tokens: that statistics count.
        widths: module name -> in_features.
    """
    if not widths:
        return
    name = max(widths, key=lambda module: widths[module])
    if tokens < ENOUGH * widths[name]:
        warnings.warn(
            f"calibration has {tokens / widths[name]:.1f} tokens per input dimension of {name} "
            f"({tokens:,} tokens, {widths[name]:,} inputs), and {ENOUGH} are better; GPTQ damps "
            "more where there are few, and the manifest says how much; give more text or "
            "--samples",
            UserWarning,
            stacklevel=3,
        )
