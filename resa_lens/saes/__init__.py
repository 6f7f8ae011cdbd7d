"""Sparse autoencoders: the coder, its training and its quality."""
