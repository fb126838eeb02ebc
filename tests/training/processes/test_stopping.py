"""Stopping inside one process; whole runs that are told to end are in
tests/reliability/test_b13_sigterm_saves_within_grace.py.
"""

import os
import signal
import threading

import pytest
from accelerate import Accelerator

from multidomain_cct.training.processes.stopping import StopRequest


def test_sigterm_is_noted_inside_and_has_its_own_meaning_outside() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(Accelerator(cpu=True)) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def train() -> None:
        with StopRequest(Accelerator(cpu=True)) as stop:
            seen.append((stop.agreed(), signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [(False, True)]


def test_ctrl_c_interrupts_until_training_begins() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest(Accelerator(cpu=True)) as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    assert not stop.agreed()
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_is_noted_while_training() -> None:
    with StopRequest(Accelerator(cpu=True)) as stop:
        stop.training = True
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed()
        assert stop.stopped(7).exit_code == 130


def test_processes_agree_on_the_signal_that_one_of_them_received() -> None:
    asked, other = StopRequest(Accelerator(cpu=True)), StopRequest(Accelerator(cpu=True))
    asked.signal = signal.SIGINT
    total = [one + two for one, two in zip(asked.flags, other.flags, strict=True)]
    assert asked.agree(total)
    assert other.agree(total)
    assert other.stopped(3).exit_code == 130
