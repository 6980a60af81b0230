"""Whatever runs to an end: data preparation, training, evaluation, prediction, jobs."""
