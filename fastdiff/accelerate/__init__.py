"""Fused layers, in place, for models that fastdiff does not import: see `accelerate`."""

from fastdiff.accelerate.report import Left, Replaced, Report
from fastdiff.accelerate.walk import accelerate, restore

__all__ = ["Left", "Replaced", "Report", "accelerate", "restore"]
