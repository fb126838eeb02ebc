import errno
import multiprocessing
import time

import pytest
from accelerate import Accelerator

from multidomain_cct.data.batches.bad_images import TooManyBadImages
from multidomain_cct.data.shards.download import SourceError
from multidomain_cct.errors import UserError
from multidomain_cct.training.processes.failures import RunFailed, mistakes_in_common, no_process_left, one_line_errors


@pytest.mark.parametrize(
    ("error", "world", "kind", "message"),
    [
        (UserError("a.tar: bad"), 1, UserError, "^a.tar: bad$"),
        (UserError("a.tar: bad"), 2, UserError, "^rank 1: a.tar: bad$"),
        (ValueError("zip() argument 2 is longer than argument 1"), 2, ValueError, "^zip"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/runs/x"),
            2,
            RunFailed,
            "^rank 1: /runs/x: No space left on device. Make room",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            1,
            RunFailed,
            r"a loader process died: DataLoader worker \(pid 7\) is killed",
        ),
        (
            RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:4"),
            2,
            RunFailed,
            "^another process of the run has ended",
        ),
        (RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:4"), 1, RuntimeError, "pair.cc"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 2, RuntimeError, "^mat1 and mat2"),
        (RunFailed("step 3: a is nan"), 2, RunFailed, "^step 3: a is nan$"),
        (SourceError("https://host/a: HTTP 403"), 2, RunFailed, "^rank 1: https://host/a: HTTP 403$"),
        (TooManyBadImages("a: 3 of 9 images"), 2, TooManyBadImages, "^a: 3 of 9 images"),
    ],
)
def test_errors_become_one_line_and_faults_of_the_software_stay_what_they_are(
    error: Exception, world: int, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message), one_line_errors(1, world):
        raise error


def test_a_mistake_of_a_single_process_stays_as_it_is() -> None:
    with pytest.raises(UserError, match="^no such recipe$"), mistakes_in_common(Accelerator(cpu=True)):
        raise UserError("no such recipe")


def test_a_fault_of_a_single_process_stays_what_it_is() -> None:
    with pytest.raises(ValueError, match="^zip"), mistakes_in_common(Accelerator(cpu=True)):
        raise ValueError("zip() argument 2 is longer than argument 1")


def test_processes_that_an_error_leaves_are_ended_and_those_from_before_stay() -> None:
    older, left = (
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True) for _ in range(2)
    )
    older.start()
    with pytest.raises(ZeroDivisionError), no_process_left():
        left.start()
        raise ZeroDivisionError
    assert not left.is_alive()
    assert older.is_alive()
    older.kill()
    older.join()


def test_a_file_that_cannot_be_fetched_before_the_run_begins_is_a_failed_run() -> None:
    with pytest.raises(RunFailed, match="^https://host/a: HTTP 403$"), mistakes_in_common(Accelerator(cpu=True)):
        raise SourceError("https://host/a: HTTP 403")
