"""Decoders: where their blocks are, what is quantized in them, how to run one block at a time."""
