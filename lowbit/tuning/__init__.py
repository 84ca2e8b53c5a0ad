"""What changes a block as a whole: folds before its weights are quantized, tuning afterwards."""
