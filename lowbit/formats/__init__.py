"""Formats of checkpoints: one file for each layout, the table of them, and conversion."""
