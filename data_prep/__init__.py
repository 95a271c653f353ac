"""Preparation of data: training of tokenizers, shards from a corpus, examples from rows."""
