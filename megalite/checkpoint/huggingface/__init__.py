"""Models of Hugging Face, both ways: from a folder of theirs, and to one."""

from megalite.checkpoint.huggingface.export import DTYPES, export
from megalite.checkpoint.huggingface.families import FAMILIES, family_of, from_config, to_config
from megalite.checkpoint.huggingface.folder import HuggingFaceFolder, is_huggingface

__all__ = [
    "DTYPES",
    "FAMILIES",
    "HuggingFaceFolder",
    "export",
    "family_of",
    "from_config",
    "is_huggingface",
    "to_config",
]
