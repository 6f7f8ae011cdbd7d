"""The layers page."""
