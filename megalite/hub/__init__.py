"""Folders of models and tokenizers: by path, by a name on the Hugging Face hub, by their kind."""

from megalite.hub.resolve import find_model, find_tokenizer, parse_name, unreachable

__all__ = ["find_model", "find_tokenizer", "parse_name", "unreachable"]
