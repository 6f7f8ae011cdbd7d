"""Artifacts: what a workspace holds, and how it is written and read."""
