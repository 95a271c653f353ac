"""Checkpoints: saved as named tensors, published by one rename, checked on resume."""

from megalite.checkpoint.differences import compare_models
from megalite.checkpoint.huggingface import HuggingFaceFolder, is_huggingface
from megalite.checkpoint.lease import Lease, take_lease
from megalite.checkpoint.load import (
    find_newest,
    import_weights,
    load_weights,
    open_checkpoint,
    refuse_other_model,
    restore,
)
from megalite.checkpoint.progress import Progress
from megalite.checkpoint.retention import (
    clear_leftovers,
    retain,
    set_aside_damaged,
    set_aside_newer,
)
from megalite.checkpoint.save import Saver, checkpoint_bytes
from megalite.checkpoint.start import (
    describe_run,
    describe_start,
    find_base,
    open_model_folder,
    require_head,
)
from megalite.checkpoint.stored import (
    GrownVocabulary,
    StoredCheckpoint,
    TensorSource,
    load_into,
    merge_lora,
)

__all__ = [
    "GrownVocabulary",
    "HuggingFaceFolder",
    "Lease",
    "Progress",
    "Saver",
    "StoredCheckpoint",
    "TensorSource",
    "checkpoint_bytes",
    "clear_leftovers",
    "compare_models",
    "describe_run",
    "describe_start",
    "find_base",
    "find_newest",
    "import_weights",
    "is_huggingface",
    "load_into",
    "load_weights",
    "merge_lora",
    "open_checkpoint",
    "open_model_folder",
    "refuse_other_model",
    "require_head",
    "restore",
    "retain",
    "set_aside_damaged",
    "set_aside_newer",
    "take_lease",
]
