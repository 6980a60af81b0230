"""Data: where examples come from, their preparation, and the order in which they are seen."""
