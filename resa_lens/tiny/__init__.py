"""The bundled model: its question families, tokenizer and training script."""
