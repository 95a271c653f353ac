"""Files on disk: shards of tokens with their manifest, tokenizers, checkpoints. No torch."""
