"""Large tensors without a visit to the kernel each time, on the CPU (ours).

glibc hands a freed block above 32 MiB back to the kernel, and asks for it again at the next step. The kernel then
clears every page anew: with histories as text, that was half of a training step's time
(``benchmarks/bench_freed_memory.py``).
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's <malloc.h>


def keep_freed_memory() -> bool:
    """From now on, memory that this process frees stays with it for the next tensor. Returns whether it was arranged.

    The process looks as large as it was at its peak until it ends. False where the C library is not glibc (macOS,
    Windows, Alpine), or another allocator took malloc's place and does not listen.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, -1))
