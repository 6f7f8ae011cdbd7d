"""The prompt lab: its page and the process behind it."""
