"""What the machine is, what it measures, and what a model will need of it."""
