"""What a number was measured with: code, processor, memory."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

import userllm
from userllm import processes
from userllm.bfloat16 import multiplies


def commit() -> str:
    """The commit of the code that runs, with "+changes" where files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent.parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--", "."], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def hardware() -> str:
    """Processor, its instructions, cores and memory, and the GPU where there is one.

    Equal CPU seconds are unequal arithmetic where the instructions differ, bfloat16's above all.
    """
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), model)
    except OSError:
        model = f"{model} (no /proc/cpuinfo)"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    gpu += f", {processes.count()} processes" if processes.count() > 1 else ""
    bfloat16 = "with" if multiplies(torch.device("cpu")) else "without"
    able = f"{torch.backends.cpu.get_cpu_capability()} {bfloat16} bfloat16"
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return f"{model}, {able}, {cores} cores, {threads} threads, {memory:.0f} GiB{gpu}"


def software() -> str:
    """Versions that numbers depend on: this package, Python, torch (with its build) and transformers."""
    return (
        f"userllm {userllm.__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {version('transformers')}"
    )


def peaks_mb() -> dict[str, float]:
    """Most memory of this process so far, in MiB: resident, and on its GPU where there is one (what tensors took)."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peaks = {"peak_rss_mb": round(resident, 1)}
    if torch.cuda.is_available():
        peaks["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peaks
