"""Checks of a saved checkpoint: after every save, and whenever somebody asks."""

from lowbit.verification.report import Check, Report
from lowbit.verification.run import gate, verify

__all__ = ["Check", "Report", "gate", "verify"]
