"""GGUF, the files of llama.cpp: read as checkpoints, written from them."""

from lowbit.formats.gguf.verification import verify_file

__all__ = ["verify_file"]
