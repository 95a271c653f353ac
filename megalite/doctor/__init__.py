"""Checks of a machine, and of a run file on it; each result has a remedy."""

from megalite.doctor.examine import examine
from megalite.doctor.result import CheckResult, print_results

__all__ = ["CheckResult", "examine", "print_results"]
