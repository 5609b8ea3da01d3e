"""A recipe and what its paper printed -> the trainings that repeat it, and how far they are from it."""
