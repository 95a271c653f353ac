"""Batches from shards or examples: the order of samples, mixtures of sources, the loader."""

from megalite.data.batch import Batch, Count, StepBatches
from megalite.data.dataset import Dataset, open_data, open_train, open_valid, set_corruption
from megalite.data.examples import ExampleSet
from megalite.data.loader import Loader, advance, first_batches
from megalite.data.packing import Packing, assemble, pack
from megalite.data.samples import Samples

__all__ = [
    "Batch",
    "Count",
    "Dataset",
    "ExampleSet",
    "Loader",
    "Packing",
    "Samples",
    "StepBatches",
    "advance",
    "assemble",
    "first_batches",
    "open_data",
    "open_train",
    "open_valid",
    "pack",
    "set_corruption",
]
