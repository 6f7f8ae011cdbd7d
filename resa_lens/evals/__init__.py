"""Scores: question sets, generation, grading and accuracy with intervals."""
