"""The table of layouts."""

from __future__ import annotations

from lowbit.checkpoint import Checkpoint
from lowbit.errors import LowbitError, unknown_name
from lowbit.formats.awq import Awq
from lowbit.formats.base import Layout, quantization_of
from lowbit.formats.bnb import Bnb
from lowbit.formats.compressed_tensors import CompressedTensors
from lowbit.formats.gguf.layout import Gguf
from lowbit.formats.gptq import Gptq
from lowbit.formats.own import Bf16, Lowbit

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Lowbit(),
        CompressedTensors(),
        Gptq(version=1),
        Gptq(version=2),
        Awq(),
        Bnb(),
        Gguf(),
        Bf16(),
    )
}


def layout_named(name: str, dtype: str = "bfloat16") -> Layout:
    """Returns the layout of that name.

    Args:
        name: as on the command line.
        dtype: of the model, which some layouts write down.

    Raises:
        LowbitError: if there is none.
    """
    layout = LAYOUTS.get(name.lower())
    if layout is None:
        raise unknown_name("format", name, LAYOUTS)
    return Bnb(dtype) if isinstance(layout, Bnb) else layout


def layout_of(checkpoint: Checkpoint) -> Layout:
    """Returns the layout of a checkpoint.

    Raises:
        LowbitError: for a quantization that no layout here reads.
    """
    quantization = quantization_of(checkpoint)
    for layout in LAYOUTS.values():
        if layout.matches(quantization):
            return layout
    method = quantization.get("quant_method")
    raise LowbitError(
        f"{checkpoint.path}: the quantization {str(method)[:60]!r} is not read; needed one of "
        f"{', '.join(LAYOUTS)}"
    )
