"""Tokenizers: SentencePiece models, Hugging Face's `tokenizer.json`, plain bytes."""
