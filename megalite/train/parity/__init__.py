"""Proof that a run file trains the same model on every layout, each in processes of its own."""

from megalite.train.parity.layouts import REFERENCE, Layout, Resume, layouts, resumes
from megalite.train.parity.prove import Finding, Proof, as_json
from megalite.train.parity.trial import Trial, make_trial, usable_ranks

__all__ = [
    "REFERENCE",
    "Finding",
    "Layout",
    "Proof",
    "Resume",
    "Trial",
    "as_json",
    "layouts",
    "make_trial",
    "resumes",
    "usable_ranks",
]
