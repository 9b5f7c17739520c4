"""Threads that nobody notices: the same pieces in the same order, errors where they belong, nothing left running."""

import threading
import time

import pytest

from userllm.data.in_turn import ahead, aside, each


def test_ahead_gives_the_same_pieces_and_is_ahead():
    made = []

    def pieces():
        for number in range(20):
            made.append(number)
            yield number

    found = []
    for number in ahead(pieces()):
        found.append(number)
        assert len(made) <= number + 5  # two wait, one is being handed over
    assert found == list(range(20))
    assert list(ahead([])) == []


def test_an_error_comes_after_what_was_made_before_it():
    def pieces():
        yield 1
        yield 2
        raise KeyError("three")

    taken = ahead(pieces())
    assert [next(taken), next(taken)] == [1, 2]
    with pytest.raises(KeyError, match="three"):
        next(taken)


def test_who_stops_early_leaves_no_thread():
    def pieces():
        while True:
            yield 0

    before = threading.active_count()
    taken = ahead(ahead(pieces()))
    assert next(taken) == 0
    taken.close()
    assert threading.active_count() == before


def test_aside():
    go = threading.Event()

    def work():
        go.wait()
        return 7

    result = aside(work)
    go.set()
    assert result() == result() == 7
    with pytest.raises(ZeroDivisionError):
        aside(lambda: 1 // 0)()


def test_each_keeps_the_order_and_few_results():
    open_, most, lock = 0, 0, threading.Lock()

    def work(number):
        nonlocal open_, most
        with lock:
            open_ += 1
            most = max(most, open_)
        time.sleep(0.001 * (number % 3))
        return number * number

    found = []
    for square in each(work, range(30)):
        open_ -= 1
        found.append(square)
    assert found == [number * number for number in range(30)]
    assert most < 30


def test_each_raises():
    with pytest.raises(ZeroDivisionError):
        list(each(lambda number: 1 // number, [2, 1, 0, 3]))
