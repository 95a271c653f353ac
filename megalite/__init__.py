"""MegaLite: train large Transformer models so that the run can be trusted."""

__version__ = "0.1.0"
