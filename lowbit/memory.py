"""Giving memory back to the system: what was freed, and what a mapped file can give again.

glibc keeps freed chunks below 32 MB in its arenas, and every block of a decoder is a different
sequence of allocations from several threads. Without trimming, resident memory grows with the
number of blocks although nothing is alive: by 12 MB per 26 MB block of a random Llama of 48
blocks, from 0.4 to 1.0 GB. Trimming once per block costs milliseconds and keeps it level.

Tensors of a safetensors file are mapped, and one mapping holds the whole file as long as any of
them is alive. Pages that were read stay resident; dropping them once a tensor has been rearranged
or quantized keeps both forms of it from being counted at once.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

_M_MMAP_THRESHOLD = -3  # malloc.h of glibc
# Bits of /proc/self/pagemap (Linux, Documentation/admin-guide/mm/pagemap.rst).
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def release_freed_memory() -> None:
    """Asks the C library to return what is free; does nothing where it cannot be asked."""
    trim = _c_function("malloc_trim")
    if trim is not None:
        trim(0)


def map_large_blocks() -> None:
    """Asks the C library to map every allocation of 1 MiB or more by itself, from now on.

    Training allocates activations of several MB in an order that differs between forward and
    backward pass. glibc's own threshold grows to 32 MB, and below it freed chunks are split by
    later ones: a step then holds a third more than is alive. Mapped blocks go back when they are
    freed, at the price of pages that are faulted in anew. Does nothing where it cannot be asked.
    """
    mallopt = _c_function("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def drop_mapped_pages(tensor: Tensor) -> bool:
    """Makes the pages of a `tensor` that is mapped from a file not resident; its values stay.

    The file gives them again when they are read. Nothing is done, and False returned, for
    allocated memory, for a mapped page that was written to (only this process has it), and where
    the system does not tell them apart.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return False
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page)
    last = (tensor.data_ptr() + tensor.nbytes) // page
    advise = _c_function("madvise")
    if last <= first or advise is None or not _are_clean_file_pages(first, last - first):
        return False
    start, size = ctypes.c_void_p(first * page), ctypes.c_size_t((last - first) * page)
    return int(advise(start, size, mmap.MADV_DONTNEED)) == 0


def _are_clean_file_pages(first: int, count: int) -> bool:
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(first * 8)
            entries = np.frombuffer(pagemap.read(count * 8), dtype=np.uint64)
    except OSError:
        return False
    if entries.size != count or bool((entries & _SWAPPED).any()):
        return False
    present = entries[entries & _PRESENT != 0]
    return present.size > 0 and bool((present & _OF_FILE).all())


@functools.cache
def _c_function(name: str) -> Callable[..., int] | None:
    """Returns a function of the C library, None where it has none of that name."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
    return found
