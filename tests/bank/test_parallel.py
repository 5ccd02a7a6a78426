"""Workers do many things together, and leave none behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import pytest

from memlong.bank.store.parallel import _THREADS, MOST_THREADS, Workers


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


def pool_threads() -> set[int | None]:
    return {each.ident for each in threading.enumerate() if each.name.startswith("memlong-kv")}


def test_workers_share_the_threads_of_a_process() -> None:
    for _ in range(2):
        for workers in (Workers(4), Workers(4)):
            together = threading.Barrier(4, timeout=10)
            workers.each(lambda _, together=together: together.wait(), range(4))  # type: ignore[misc]
    assert _THREADS.pool() is _THREADS.pool()
    assert 3 <= len(pool_threads()) <= MOST_THREADS


def run(program: str, *given: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, given)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BEGIN = """
import os, sys, threading
from memlong.bank.store.parallel import Workers, _THREADS

def together():
    barrier = threading.Barrier(3, timeout=20)
    Workers(3).each(lambda _: barrier.wait(), range(3))

def count():
    return sum(each.name.startswith("memlong-kv") for each in threading.enumerate())

assert _THREADS._pool is None  # until it is needed
Workers(3).each(lambda _: None, [1])
assert _THREADS._pool is None
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_makes_its_own_threads() -> None:
    run(
        BEGIN
        + "together()\n"
        + "child = os.fork()\n"
        + "if not child:\n"
        + "    assert count() == 0\n"
        + "    together()\n"
        + "    assert count() > 0\n"
        + "    sys.exit()\n"
        + "assert os.waitpid(child, 0)[1] == 0\n"
        + "together()\n"
    )


def test_the_threads_let_the_interpreter_exit_and_the_caller_works_alone_then() -> None:
    program = (
        BEGIN
        + "import atexit\n"
        + "def late():\n"
        + "    done = []\n"
        + "    Workers(3).each(done.append, range(5))\n"
        + "    print(sorted(done))\n"
        + "atexit.register(late)\n"
    )
    assert run(program).strip() == "[0, 1, 2, 3, 4]"
    assert run(program + "together()\n").strip() == "[0, 1, 2, 3, 4]"
