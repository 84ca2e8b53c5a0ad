"""Calibration: documents, token windows and the statistics gathered on them."""
