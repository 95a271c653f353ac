"""Comparison of runs on one self-contained HTML page."""

from megalite.report.page import render
from megalite.report.record import read_records

__all__ = ["read_records", "render"]
