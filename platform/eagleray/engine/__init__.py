"""Inference: a checkpoint that answers; knows neither Serve nor HTTP."""
