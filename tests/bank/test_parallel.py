"""Workers do many things together, and leave none behind."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

from memlong.bank.store.parallel import Workers


def test_each_thing_is_done_once() -> None:
    done: list[int] = []
    Workers(4).each(done.append, range(100))
    assert sorted(done) == list(range(100))


def test_the_first_error_is_raised_when_nothing_goes_on_any_more() -> None:
    running, begun = threading.Semaphore(0), []

    def act(number: int) -> None:
        begun.append(number)
        running.release()
        if number == 0:
            running.acquire(timeout=5)
            running.acquire(timeout=5)
            raise OSError("no")
        time.sleep(0.05)
        begun.append(-number)

    with pytest.raises(OSError, match="no"):
        Workers(2).each(act, range(100))
    assert begun.count(0) == 1
    assert {-number for number in begun if number > 0} == {number for number in begun if number < 0}
    assert len(begun) < 50


def test_an_error_keeps_nothing_alive() -> None:
    class Thing:
        pass

    def act(thing: Thing) -> None:
        raise OSError("no")

    thing = Thing()
    gone = weakref.ref(thing)
    gc.disable()
    try:
        with pytest.raises(OSError, match="no"):
            Workers(2).each(act, [thing])
        del thing
        assert gone() is None
    finally:
        gc.enable()
