"""Measures of fine-tuned models, a file a kind of task."""
