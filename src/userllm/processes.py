"""Several processes at one task, as ``torchrun`` and ``accelerate launch`` start them.

One process is the rule: then ``start`` does nothing, and everything below does what it would do without this module.
With several, each is one of ``count()``, numbered from 0; number 0 is the main one: it prepares data, writes files and
prints. They need a file system that all of them see.

    told        the main process works, the others wait for what came out
    main_first  the main process works, then the others do the same (and find it done)
    spread      each does its share of the parts, and all get every result, in order
    share       a batch is spread over the processes: what a mean over it has to be divided by
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from userllm.errors import UserError

Part = TypeVar("Part")
Result = TypeVar("Result")

_PATIENCE = timedelta(days=7)
"""How long the others wait while the main process prepares data. When a process dies, its launcher ends them all."""

_LAUNCHED_WITH = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher says to each process beside WORLD_SIZE."""

_group: dist.ProcessGroup | None = None
_in_batch = False


def start() -> None:
    """Join the other processes if a launcher started several; more calls do nothing more.

    The processes that are not the main one stop printing to standard output. Each takes the accelerator of its number
    on its machine; without one, CPUs talk through gloo. Raises UserError for more processes than accelerators, and
    where what a launcher says is not whole.
    """
    global _group
    if _group is not None or launched() < 2:
        return
    if not dist.is_initialized():
        if missing := [name for name in _LAUNCHED_WITH if name not in os.environ]:
            raise UserError(
                f"WORLD_SIZE is {launched()}, and {', '.join(missing)} not set: several processes are started by "
                "torchrun or accelerate launch, which set them all; for one alone unset WORLD_SIZE"
            )
        dist.init_process_group(_backend())
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup)  # it is everybody's
    _group = group
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives


def launched() -> int:
    """How many processes a launcher started, by what it says to each; 1 without one. Raises UserError where that is no
    number."""
    said = os.environ.get("WORLD_SIZE", "1")
    if not (said.isascii() and said.isdecimal()):
        raise UserError(
            f"the environment's WORLD_SIZE is {said!r}; a launcher sets it to a number, or unset it"
        )
    return int(said)


def stop() -> None:
    """Leave the others, at the end of a command that went well."""
    global _group
    if _group is not None:
        wait()
        _group = None
        dist.destroy_process_group()


def fsdp_asked() -> bool:
    """Whether ``accelerate launch`` was told to use FSDP, which is then ours to do: it is not asked a second time.

    Raises UserError for FSDP's first version.
    """
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("userllm shards by FSDP2; say `accelerate launch --use_fsdp --fsdp_version 2`")
    return True


def _backend() -> str:
    if not torch.accelerator.is_available():
        return "gloo"
    here, there = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if here >= there:
        raise UserError(
            f"process {here} of this machine has no accelerator: there are {there}; start as many"
        )
    torch.accelerator.set_device_index(here)
    kind = device().type
    return f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"


def device() -> torch.device:
    """Where this process computes."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def count() -> int:
    """How many processes."""
    return 1 if _group is None else dist.get_world_size(_group)


def number() -> int:
    """Which one this is, from 0."""
    return 0 if _group is None else dist.get_rank(_group)


def is_main() -> bool:
    """Whether this is the one that writes and prints."""
    return number() == 0


def wait() -> None:
    """Go on when all have come this far."""
    if _group is not None:
        dist.barrier(group=_group)


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the ``with`` block, then the others do."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def told(work: Callable[[], Result]) -> Result:
    """What ``work()`` gives in the main process, in all of them; only there it is called. So is a UserError raised."""
    if _group is None:
        return work()
    said: list[Any] = [None]
    if is_main():
        try:
            said = [work()]
        except UserError as error:
            said = [error]
    dist.broadcast_object_list(said, src=0, group=_group)
    if isinstance(said[0], UserError):
        raise said[0]
    result: Result = said[0]
    return result


def everyone(value: Result) -> list[Result]:
    """Each process's value, by its number."""
    if _group is None:
        return [value]
    said: list[Any] = [None] * count()
    dist.all_gather_object(said, value, group=_group)
    return said


def total(value: float) -> float:
    """The sum of each process's value."""
    return value if _group is None else sum(everyone(value))


def spread(parts: Sequence[Part], work: Callable[[Part], Result]) -> list[Result]:
    """``work`` of every part, in the parts' order. Each process works on every so manieth part, and gets all results.

    A part is worked on by one process alone, so that results are those of a single process bit for bit.
    """
    mine = [work(part) for part in parts[number() :: count()]]
    if _group is None:
        return mine
    said = everyone(mine)
    return [said[place % count()][place // count()] for place in range(len(parts))]


def own_places(of: int) -> range:
    """The places, out of so many, that are this process's share of a batch."""
    return range(number(), of, count())


@contextmanager
def one_batch() -> Iterator[None]:
    """Inside, what the processes work on are shares of one batch, and ``share`` says so."""
    global _in_batch
    before, _in_batch = _in_batch, True
    try:
        yield
    finally:
        _in_batch = before


def share(here: int) -> float:
    """What to divide a sum over this process's part of a batch by, for a mean over the batch.

    here: how many there are of what the mean is over, in this process; outside ``one_batch`` it is that, or 1. Inside,
    it is the number in all processes over the number of processes: then the mean of what each process gets, and of its
    gradients, is the batch's. Every process has to ask equally often.
    """
    if _group is None or not _in_batch:
        return max(here, 1)
    return max(batch_totals([here])[0], 1) / shares()


def shares() -> int:
    """How many processes have a share of the batch that a loss is a mean over; 1 outside ``one_batch``."""
    return count() if _in_batch else 1


def batch_totals(here: Sequence[int]) -> list[int]:
    """Counts over the whole batch: inside ``one_batch`` sums over the processes, elsewhere the numbers themselves."""
    if _group is None or not _in_batch:
        return list(here)
    counts = torch.tensor(here, dtype=torch.long)
    dist.all_reduce(counts, group=_group)
    return counts.tolist()
