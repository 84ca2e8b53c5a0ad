"""Writes tests/golden/packing.json: what compressed-tensors itself packs codes into.

Run it after upgrading compressed-tensors; the file must not change:

    python scripts/make_golden_packing.py

The committed file lets the packing test run without that library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "packing.json"


def cases() -> list[dict[str, Any]]:
    """Returns codes and packed words for every width, ragged sizes and both packed dimensions.

    Weights are packed along in_features (packed_dim 1), zero points along out_features (0).
    33 and 43 codes of 3 bits end inside a word after several codes that straddle two words.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for bits in (2, 3, 4, 8):
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        for packed_dim, shape in (
            (1, (3, 33)),
            (1, (2, 43)),
            (1, (2, 64)),
            (0, (13, 3)),
            (0, (32, 2)),
        ):
            codes = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)
            packed = pack_to_int32(codes, bits, packed_dim=packed_dim)
            found.append(
                {
                    "bits": bits,
                    "packed_dim": packed_dim,
                    "codes": codes.tolist(),
                    "packed": packed.tolist(),
                }
            )
    return found


def main() -> None:
    """Writes the file."""
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases())
    GOLDEN.write_text(f"[\n{lines}\n]\n")
    print(f"wrote {GOLDEN} ({GOLDEN.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
