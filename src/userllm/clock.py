"""What seconds of work are: CPU seconds of this process on a CPU, wall-clock seconds on an accelerator."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds from some fixed moment on: of all threads together on a CPU, whatever else keeps the machine busy."""
    return time.process_time if device.type == "cpu" else time.perf_counter
