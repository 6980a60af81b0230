"""Tasks: example to tensors, loss, answers, scores."""

from eagleray.tasks.base import Answer, Batch, Encoded, Example, Features, Loss, Processor, Task, move
from eagleray.tasks.loading import load_task, task_class

__all__ = [
    "Answer",
    "Batch",
    "Encoded",
    "Example",
    "Features",
    "Loss",
    "Processor",
    "Task",
    "load_task",
    "move",
    "task_class",
]
