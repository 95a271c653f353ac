"""What is on disk: shards of tokens with their manifest, tokenizers, checkpoints. Never torch."""
