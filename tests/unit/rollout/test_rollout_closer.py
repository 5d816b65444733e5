"""Sessions are closed beside generation, all of them before a run ends."""

import threading

import pytest

from appo_lightning.rollout.closer import Closer


def test_everything_submitted_is_closed_in_order_when_the_wait_returns():
    closer, closed = Closer(), []
    for number in range(3):
        closer.submit(lambda number=number: closed.append(number))
    closer.wait()
    assert closed == [0, 1, 2]


def test_closing_never_happens_in_the_thread_that_submits():
    closer, threads = Closer(), []
    closer.submit(lambda: threads.append(threading.current_thread()))
    closer.wait()
    assert threads != [threading.current_thread()]


def test_a_close_that_raises_is_told_once_and_the_next_one_still_happens():
    closer, closed = Closer(), []
    closer.submit(lambda: 1 / 0, lambda: closed.append("second"))
    closer.submit(lambda: closed.append("third"))
    with pytest.raises(ZeroDivisionError):
        closer.wait()
    assert closed == ["second", "third"]
    closer.wait()


def test_the_thread_ends_with_its_owner():
    before = set(threading.enumerate())
    closer = Closer()
    closer.submit(lambda: None)
    closer.wait()
    (thread,) = set(threading.enumerate()) - before
    del closer
    thread.join(5)
    assert not thread.is_alive()
