"""Work on several cores, results in order: reading goes on while what was read is used, blocks are worked on at once.

Threads are enough: numpy, polars and hashlib let other threads run while they work.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import polars as pl

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 2
"""Pieces that are ready and not yet used, at most."""


def ahead(pieces: Iterable[T]) -> Iterator[T]:
    """The same pieces; the next ones are made in a thread while one is used. Errors arise where they would have."""
    ready: queue.Queue[tuple[str, object]] = queue.Queue(AHEAD)
    wanted = threading.Event()
    wanted.set()

    def put(kind: str, piece: object) -> bool:
        while wanted.is_set():
            try:
                ready.put((kind, piece), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for piece in pieces:
                if not put("piece", piece):
                    return
            put("end", None)
        except BaseException as error:  # noqa: BLE001 - raised again where the piece is asked for
            put("error", error)
        finally:
            if isinstance(pieces, Generator):  # it may have threads of its own
                pieces.close()

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            kind, piece = ready.get()
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(piece, BaseException)
                raise piece
            yield piece  # type: ignore[misc]
    finally:
        wanted.clear()
        thread.join()


def aside(work: Callable[[], R]) -> Callable[[], R]:
    """Begins ``work`` in a thread; the function returned waits for it and gives its result, or raises its error.

    Whoever never asks does not wait: the thread ends with the process.
    """
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result


def each(work: Callable[[T], R], pieces: Iterable[T]) -> Iterator[R]:
    """``work`` of every piece, in order; on as many cores as polars uses, with few results waiting."""
    threads = pl.thread_pool_size()
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for piece in pieces:
                waiting.append(pool.submit(work, piece))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
