"""Memory that is freed stays with the process."""

import platform
import subprocess
import sys

import pytest

from userllm.freed_memory import available_share

FREED = """
import resource, sys, torch
from userllm.freed_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults(mebibytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(mebibytes << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(132)  # one as large as the next may leave a hole that is some bytes too small, by where the heap begins
print(faults(128))  # 32,768 pages
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")
@pytest.mark.slow  # two processes that load torch
def test_the_second_large_tensor_needs_no_new_pages():
    pages = {
        way: int(
            subprocess.run(
                [sys.executable, "-c", FREED, way], capture_output=True, text=True, check=True
            ).stdout
        )
        for way in ("keep", "hand back")
    }
    assert pages["hand back"] > 50  # or there was nothing to gain: few, where the kernel gives huge pages
    assert pages["keep"] < pages["hand back"] / 10


HOLE = """
import sys
from pathlib import Path
import torch
from userllm import freed_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])
freed_memory.keep_freed_memory()
large = torch.ones(32 << 20)
with_it = resident()
last = torch.ones(1000)  # above the hole that is left
del large
"""
"""A process with 32,768 pages that are free and kept."""

LEFT = (
    HOLE
    + """
kept = resident()
freed_memory.hand_back()
print(with_it - kept, with_it - resident())
"""
)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")
def test_what_is_free_is_handed_back_when_asked():
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, check=True)
    kept, handed = map(int, done.stdout.split())
    assert kept < 1000 and handed > 30_000  # of 32,768 pages


SCARCE = (
    HOLE
    + """
freed_memory.available_share = lambda: float(sys.argv[1])
freed_memory.hand_back_if_scarce()
print(with_it - resident())
"""
)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")
@pytest.mark.slow  # a process that loads torch
@pytest.mark.parametrize(("left", "handed"), [(0.1, True), (0.5, False)])
def test_where_memory_is_scarce_nothing_free_is_kept(left, handed):
    done = subprocess.run(
        [sys.executable, "-c", SCARCE, str(left)], capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) > 30_000) == handed  # of 32,768 pages


def test_what_is_left_is_the_kernels_estimate(tmp_path):
    told = tmp_path / "meminfo"
    told.write_text(
        "MemTotal:       4000 kB\nMemFree:         100 kB\nMemAvailable:   1000 kB\nHugePages_Total: 0\n"
    )
    assert available_share(told) == 0.25
