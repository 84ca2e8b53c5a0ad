"""Runs in an environment that has llama-cpp-python and not lowbit; one JSON object is a request.

{"do": "logits", "model": FILE, "ids": FILE.npy, "out": FILE.npy}   float32 [tokens, vocabulary]
{"do": "tokens", "model": FILE, "text": TEXT, "out": FILE.npy}
{"do": "quantize", "model": FILE, "type": llama_ftype, "pure": BOOL, "out": FILE}
"""

from __future__ import annotations

import json
import sys
from typing import Any

import llama_cpp
import numpy as np


def logits(request: dict[str, Any]) -> None:
    """Writes the logits at every position."""
    ids = np.load(request["ids"])
    model = llama_cpp.Llama(
        request["model"],
        n_ctx=len(ids),
        n_batch=len(ids),
        n_threads=1,
        type_k=llama_cpp.GGML_TYPE_F32,  # else keys and values are rounded to fp16
        type_v=llama_cpp.GGML_TYPE_F32,
        logits_all=True,
        verbose=False,
    )
    model.eval(ids.tolist())
    np.save(request["out"], np.array(model.scores[: len(ids)]))


def tokens(request: dict[str, Any]) -> None:
    """Writes the ids of a text, special ones added as the file says."""
    model = llama_cpp.Llama(request["model"], vocab_only=True, verbose=False)
    np.save(request["out"], np.array(model.tokenize(request["text"].encode())))


def quantize(request: dict[str, Any]) -> None:
    """Writes a file in a type of llama.cpp's own choice of codes."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = request["type"], 1
    if request.get("pure"):
        # Every layer gets the type, and, as we do, the embedding stays as it is.
        parameters.pure = True
        parameters.token_embedding_type = 30  # GGML_TYPE_BF16
    files = request["model"].encode(), request["out"].encode()
    if llama_cpp.llama_model_quantize(*files, parameters):
        raise SystemExit(f"llama.cpp did not quantize {request['model']}")


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    {"logits": logits, "tokens": tokens, "quantize": quantize}[asked["do"]](asked)
