"""Runs side by side on one HTML page that needs nothing else."""

from megalite.report.page import render
from megalite.report.record import read_records

__all__ = ["read_records", "render"]
