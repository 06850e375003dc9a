"""What a signal does, by what the process has to save and by what came before."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from train.errors import INTERRUPTED
from train.run.signals import STOP, listening


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP)
def test_nothing_to_save_is_interrupted(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), listening():
        send(number)
        time.sleep(10)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", STOP)
def test_the_first_is_noted(number):
    told = threading.Event()
    with listening(first=told.set) as signals:
        signals.defer()
        assert not signals.stop
        send(number)
        assert signals.stop and told.wait(10)


def test_some_work_is_interrupted_all_the_same():
    with listening() as signals:
        signals.defer()
        with pytest.raises(KeyboardInterrupt), signals.interrupting():
            send(signal.SIGTERM)
            time.sleep(10)
        assert signals.stop
        with pytest.raises(KeyboardInterrupt), signals.interrupting():
            pytest.fail("the signal was there before")


def test_saving_goes_on():
    with listening() as signals:
        send(signal.SIGUSR1)  # during loading
        signals.defer()
        with signals.interrupting():
            send(signal.SIGUSR1)
        assert signals.save and not signals.stop


def test_inside_itself():
    """A run listens inside its command."""
    with pytest.raises(KeyboardInterrupt), listening() as outer:
        with listening() as inner:
            inner.defer()
            send(signal.SIGTERM)
        assert inner.stop and not outer.stop
        send(signal.SIGTERM)
        time.sleep(10)


def test_other_threads_take_no_signals():
    before = {number: signal.getsignal(number) for number in STOP}
    seen = []

    def work():
        with listening() as signals:
            signals.defer()
            now = {number: signal.getsignal(number) for number in STOP}
            seen.append(now == before and not signals.stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening() as signals:
            send(signal.SIGHUP)
            assert not signals.stop
    finally:
        signal.signal(signal.SIGHUP, before)


STUCK = """
import ctypes, sys
from train.run.signals import listening, own_process
own_process()
def last():
    print("last", flush=True)
with listening(last=last) as signals:
    if sys.argv[1] == "deferred":
        signals.defer()
    print("ready", flush=True)
    # As a long step: no Python in the main thread, and no end when a signal comes.
    mutex = ctypes.create_string_buffer(256)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(
    "mode, signals",
    [("deferred", 2), ("loading", 1)],
    ids=["second", "nothing to save"],
)
def test_a_process_that_does_not_answer_is_ended(mode, signals):
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)  # until it is out of Python
    process.send_signal(signal.SIGTERM)
    if signals == 2:
        time.sleep(0.3)  # so that it is another one
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert out == "last\n"
    assert err.startswith("stopped") and len(err.splitlines()) == 1
