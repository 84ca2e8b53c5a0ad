"""What a user may spend: bits per weight, or bytes of files."""

from __future__ import annotations

import re
from decimal import Decimal

from lowbit.errors import LowbitError

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_size(text: str | int) -> int:
    """Returns the bytes that `text` names: "4.2GB" (10^9), "4.2GiB" (2^30), "900MB", or bytes.

    Raises:
        LowbitError: if it is no positive size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", str(text), re.IGNORECASE)
    unit = found[2].upper() if found else ""
    if found is None or unit not in _UNITS or Decimal(found[1]) <= 0:
        raise LowbitError(
            f"target size {text!r} is no size; give a number with a unit, for example 4.2GB "
            "(4,200,000,000 bytes), 4.2GiB or 900MB"
        )
    return int(Decimal(found[1]) * _UNITS[unit])


def describe_bytes(size: int) -> str:
    """Returns `size` for a sentence: "4,213,000,192 bytes (4.21 GB)"."""
    for unit in ("GB", "MB", "KB"):
        if size >= _UNITS[unit]:
            return f"{size:,} bytes ({size / _UNITS[unit]:.2f} {unit})"
    return f"{size:,} bytes"
