"""Writes tests/golden/gguf.safetensors: blocks that ggml makes of weights, and what it decodes.

It runs in an environment that has llama-cpp-python and safetensors, and needs nothing of lowbit:

    python scripts/make_golden_gguf.py

Run it after upgrading llama-cpp-python; decoded values must not change (ggml may learn to choose
better blocks). Names are <type>.<tensor>: `blocks` uint8 [rows, bytes], `decoded` float32.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import llama_cpp
import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
ROWS, COLUMNS = 3, 512
# enum ggml_type
TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13,
    "Q6_K": 14, "IQ4_NL": 20,
}  # fmt: skip


def ggml() -> ctypes.CDLL:
    """Returns the library with ggml's quantization."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(folder.glob("*ggml-base.*"))))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, pointer, pointer, count, count, count, pointer,
    ]  # fmt: skip
    return library


def case(library: ctypes.CDLL, name: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the blocks of `weight`, and what they decode to."""
    blocks = np.empty(weight.nbytes, dtype=np.uint8)
    size = library.ggml_quantize_chunk(
        TYPES[name], weight.ctypes.data, blocks.ctypes.data, 0, ROWS, COLUMNS, None
    )
    # dequantize_row_q4_K, dequantize_row_iq4_nl
    decode = getattr(library, f"dequantize_row_{name.lower().replace('_k', '_K')}")
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decode.restype = None
    decoded = np.empty_like(weight)
    decode(blocks.ctypes.data, decoded.ctypes.data, weight.size)
    return {"blocks": blocks[:size].reshape(ROWS, -1).copy(), "decoded": decoded}


def main() -> None:
    """Writes the file."""
    library = ggml()
    generator = np.random.default_rng(0)
    weight = generator.normal(0, 0.05, (ROWS, COLUMNS)).astype(np.float32)
    weight[1] *= np.repeat(generator.lognormal(0, 1, COLUMNS // 16), 16)
    weight[2, :256] = np.abs(weight[2, :256])
    found = {
        f"{name}.{tensor}": content
        for name in TYPES
        for tensor, content in case(library, name, weight).items()
    }
    made_by = {"llama_cpp_python": llama_cpp.__version__}
    save_file(found, GOLDEN / "gguf.safetensors", metadata={"made_by": json.dumps(made_by)})


if __name__ == "__main__":
    main()
