"""Layouts applied to a model."""
