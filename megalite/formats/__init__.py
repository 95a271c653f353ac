"""File formats, without torch: shards and their manifest, fine-tuning examples, checkpoints."""
