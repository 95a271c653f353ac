"""Metrics of fine-tuned models, one file per kind of task."""
