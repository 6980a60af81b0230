"""What training and serving share: the file, the store, tasks, models, layouts and inference."""

__version__ = "0.1.0"
