"""Features of SAEs: which are exclusive to the think tags."""
