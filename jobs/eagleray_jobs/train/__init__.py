"""Training: driver, worker, loop, step, state, schedule, metrics."""
