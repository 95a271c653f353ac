"""Import and export of Hugging Face model folders."""

from megalite.checkpoint.huggingface.export import DTYPES, export, export_adapter
from megalite.checkpoint.huggingface.families import FAMILIES
from megalite.checkpoint.huggingface.folder import HuggingFaceFolder, is_huggingface
from megalite.checkpoint.huggingface.mapping import family_of, from_config, to_config

__all__ = [
    "DTYPES",
    "FAMILIES",
    "HuggingFaceFolder",
    "export",
    "export_adapter",
    "family_of",
    "from_config",
    "is_huggingface",
    "to_config",
]
