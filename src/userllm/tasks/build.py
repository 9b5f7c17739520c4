"""From a task's configuration to the task."""

from __future__ import annotations

import polars as pl

from userllm.errors import UserError
from userllm.tasks.base import FavoriteCategory, NextItem, Task, TaskConfig
from userllm.tasks.genre_preference import GenrePreference
from userllm.tasks.review import Review


def build_task(name: str, config: TaskConfig, items: pl.DataFrame) -> Task:
    """The task of a config over a catalogue. Raises UserError for settings that fit neither its kind nor the data."""
    if not 0 <= config.teacher <= (1 if config.kind == "next_item" else 0):
        raise UserError(
            f"task {name}: teacher is {config.teacher}; it is in 0..1 for next_item, and 0 for other kinds"
        )
    if config.target_tokens < 1:
        raise UserError(f"task {name}: target_tokens is {config.target_tokens}; a text has at least one")
    if config.kind == "next_item":
        return NextItem(name, config, items)
    if config.kind == "review":
        return Review(name, config, items)
    if config.kind == "genre_preference":
        return GenrePreference(name, config, items)
    return FavoriteCategory(name, config, items)
