"""From raw data to a report: a run folder and the stages that fill it."""

from userllm.pipeline.machine import commit, hardware, software
from userllm.pipeline.run import Run

__all__ = ["Run", "commit", "hardware", "software"]
