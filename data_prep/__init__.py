"""From a corpus to shards: train a tokenizer, encode documents, check and show the result."""
