"""Tasks: example to tensors, loss, answers, scores."""
