"""Text to token ids and back: SentencePiece, Hugging Face's `tokenizer.json`, plain bytes."""
