"""Models on disk and on a TransformerLens host, their hookpoints and activations."""
