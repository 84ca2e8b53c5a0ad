"""From a checkpoint to a quantized checkpoint, one decoder block in memory at a time."""

from lowbit.pipeline.quantization import QuantizedCheckpoint, quantize

__all__ = ["QuantizedCheckpoint", "quantize"]
