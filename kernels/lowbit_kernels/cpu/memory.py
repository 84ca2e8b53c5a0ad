"""Memory for weights, on huge pages where the system has them.

A weight is read from end to end for every token: with pages of 4 KiB the processor looks up a
million addresses on the way through 4 GB.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

# Smaller tensors share their pages with others.
_SMALLEST = 4 << 20


def empty(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns an uninitialised CPU tensor, on huge pages if it is large and Linux grants them."""
    tensor = torch.empty(size, dtype=dtype)
    advise, huge = _madvise(), getattr(mmap, "MADV_HUGEPAGE", None)
    if tensor.nbytes >= _SMALLEST and advise is not None and huge is not None:
        # Before anything is written: pages get their size when they are first touched.
        page = mmap.PAGESIZE
        start = -(-tensor.data_ptr() // page) * page
        stop = (tensor.data_ptr() + tensor.nbytes) // page * page
        advise(start, stop - start, huge)  # refused where there are none, which changes nothing
    return tensor


def cat(parts: list[Tensor]) -> Tensor:
    """Returns `parts` one after the other along their first dimension, in such memory."""
    rows = sum(part.shape[0] for part in parts)
    return torch.cat(parts, out=empty((rows, *parts[0].shape[1:]), parts[0].dtype))


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
