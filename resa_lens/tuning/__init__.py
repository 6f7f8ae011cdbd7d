"""SAE-Tuning: the objective and the trainer."""
