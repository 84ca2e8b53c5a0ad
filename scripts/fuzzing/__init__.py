"""Damaged files for every reader, and what they may do; see docs/design/interop.md."""
