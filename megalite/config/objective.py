"""Lengths of encoder inputs and decoder targets, under the objective of a run file.

T5's span corruption (Raffel et al. 2019, arXiv 1910.10683) cuts the same number of tokens out of
every window, in the same number of spans. So lengths follow from the run file, not from the text.
"""

from __future__ import annotations

import math

from megalite.config.schema import RunConfig


def spans(config: RunConfig) -> tuple[int, int]:
    """Return the number of tokens cut out of a window of text, and of spans (T5)."""
    length = config.data.sequence_length
    objective = config.objective
    noise = min(max(round(length * objective.mask_probability), 1), max(length - 1, 1))
    count = max(round(noise / objective.mean_span_length), 1)
    return noise, min(count, noise, max(length - noise, 1))


def source_length(config: RunConfig) -> int:
    """Return the length of an encoder's input, in which one sentinel replaces each span."""
    if config.finetune:
        return config.finetune.data.max_length
    noise, count = spans(config)
    return config.data.sequence_length - noise + count


def target_length(config: RunConfig) -> int:
    """Return the length of a decoder's target: each span after its sentinel, and a last one."""
    if config.finetune:
        return 1 if config.model.num_labels else config.finetune.data.max_target_length
    noise, count = spans(config)
    return noise + count + 1


def target_fraction(config: RunConfig) -> float:
    """Return the fraction of a window's tokens that are predicted: the masked ones, or all."""
    hides = config.objective.name == "masked" and config.finetune is None
    return config.objective.mask_probability if hides else 1.0


def target_count(config: RunConfig, rows: int) -> int:
    """Return the average number of predicted tokens among `rows` tokens."""
    return math.ceil(rows * target_fraction(config))
