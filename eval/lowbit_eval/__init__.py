"""Measuring what quantization did to a decoder: perplexity, divergence, slices, size, speed."""

from lowbit_eval.evaluate import EvaluationResult, Slicing, evaluate
from lowbit_eval.size import CheckpointSize, measure_size

__all__ = ["CheckpointSize", "EvaluationResult", "Slicing", "evaluate", "measure_size"]
