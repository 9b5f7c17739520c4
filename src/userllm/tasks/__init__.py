"""What is asked of a contextualised language model."""

from userllm.tasks.base import (
    ClosedTask,
    FavoriteCategory,
    NextItem,
    OpenTask,
    Task,
    TaskConfig,
    TextExample,
)
from userllm.tasks.build import build_task
from userllm.tasks.genre_preference import GenrePreference
from userllm.tasks.review import Review

__all__ = [
    "ClosedTask",
    "FavoriteCategory",
    "GenrePreference",
    "NextItem",
    "OpenTask",
    "Review",
    "Task",
    "TaskConfig",
    "TextExample",
    "build_task",
]
