"""Stopping inside one process; whole runs that are told to end are in
tests/reliability/test_b13_sigterm_saves_within_grace.py.
"""

import os
import signal
import threading

from accelerate import Accelerator

from multidomain_cct.training.processes.stopping import StopRequest


def test_sigterm_is_noted_inside_and_has_its_own_meaning_outside() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(Accelerator(cpu=True)) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
    assert signal.getsignal(signal.SIGTERM) is before and signal.set_wakeup_fd(-1) == -1


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def train() -> None:
        with StopRequest(Accelerator(cpu=True)) as stop:
            seen.append((stop.agreed(), signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [(False, True)]
