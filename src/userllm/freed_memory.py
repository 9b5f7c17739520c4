"""Large tensors without a visit to the kernel each time, on the CPU (ours).

glibc hands a freed block above 32 MiB back to the kernel, and asks for it again at the next step. The kernel then
clears every page anew: with histories as text, that was half of a training step's time
(``benchmarks/bench_freed_memory.py``).
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

SCARCE = 0.15
"""Share of the machine's memory that is left for others, below which what is free is no longer kept."""

_keeps = False
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's <malloc.h>


def keep_freed_memory() -> bool:
    """From now on, memory that this process frees stays with it for the next tensor. Returns whether it was arranged.

    Blocks of many sizes leave holes, so the process grows; ``hand_back`` now and then. False where the C library is not
    glibc (macOS, Windows, Alpine), or another allocator took malloc's place and does not listen.
    """
    global _keeps
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    _keeps = bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, -1))
    return _keeps


def hand_back() -> None:
    """Give the kernel what is free at the moment, if it was kept: between the stages of a run, and every few steps."""
    if _keeps:
        ctypes.CDLL(None).malloc_trim(0)


def hand_back_if_scarce() -> None:
    """The same where memory is ``SCARCE``, at every step and batch: holes have cost a training as much again as it
    used, and a slow step is better than a process that the kernel ends. A container's own limit is not seen."""
    if _keeps and available_share() < SCARCE:
        hand_back()


def available_share(told: Path = Path("/proc/meminfo")) -> float:
    """What programs can still have of the machine's memory, 0..1, by the kernel's own estimate."""
    entries = dict(line.split(":", 1) for line in told.read_text().splitlines())
    available, total = (int(entries[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    return available / total
