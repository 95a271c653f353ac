"""Folders of models and tokenizers, by a path or by a name on the Hugging Face hub."""

from megalite.hub.resolve import find_model, find_tokenizer, parse_name, unreachable

__all__ = ["find_model", "find_tokenizer", "parse_name", "unreachable"]
