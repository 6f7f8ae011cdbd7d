"""The main job: each stage reads what the one before left in the workspace and leaves its own.

A stage that finds its result, made with the same configuration from the same weights and data,
returns it; what it needs and does not find, it makes, and says so.
"""
