"""The page "Experts"."""
