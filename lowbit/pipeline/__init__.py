"""From a checkpoint to a quantized checkpoint, one decoder block in memory at a time."""

from lowbit.pipeline.calibration_run import calibrate
from lowbit.pipeline.plan import QuantizedCheckpoint
from lowbit.pipeline.quantization import quantize

__all__ = ["QuantizedCheckpoint", "calibrate", "quantize"]
