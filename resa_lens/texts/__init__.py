"""What a model reads: records, documents, prompts and their phases."""
