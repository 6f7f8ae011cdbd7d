"""Experts of mixture models: which ones answer to what, and what becomes of the model without."""
