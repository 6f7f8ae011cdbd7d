"""The bundled models: their question families, tokenizer and training scripts."""
