"""Adapters merged into their base: to 16 bits exactly, or to low bits by quantizing again."""

from lowbit.merging.run import HeldOut, MergeResult, merge

__all__ = ["HeldOut", "MergeResult", "merge"]
