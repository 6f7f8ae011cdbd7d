"""Doors out: what was found, in the forms that other tools and people read."""
