"""What a model is trained for: one module a task, each an object with the same protocol (`trainer.tasks.task`)."""
