"""What is asked of a contextualised language model."""

from userllm.tasks.base import (
    ClosedTask,
    FavoriteCategory,
    NextItem,
    OpenTask,
    Task,
    TaskConfig,
    TextExample,
    build_task,
)

__all__ = [
    "ClosedTask",
    "FavoriteCategory",
    "NextItem",
    "OpenTask",
    "Task",
    "TaskConfig",
    "TextExample",
    "build_task",
]
