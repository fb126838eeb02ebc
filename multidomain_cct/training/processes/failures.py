"""Errors that end a run with one line, in all its processes."""

from __future__ import annotations

import multiprocessing
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed import DistError

from multidomain_cct.data.batches.bad_images import TooManyBadImages
from multidomain_cct.data.shards.download import SourceError
from multidomain_cct.errors import UserError, death_of_loader, is_out_of_memory

GO_ON = "The run goes on from its last checkpoint with resume=auto."


class RunFailed(RuntimeError):
    """A run that cannot go on, for a reason that is not the user's mistake. The message is one line."""


@contextmanager
def mistakes_in_common(accelerator: Accelerator) -> Iterator[None]:
    """An error of one process becomes an error in all of them, so that none waits for the others.

    An error that not all of them share names the rank. A file that cannot be fetched, or not read by all, is RunFailed.
    """
    mine: UserError | OSError | None = None
    try:
        yield
    except (UserError, OSError) as error:
        mine = error
    errors: list[tuple[str, bool] | None] = gather_object([mine and (str(mine), isinstance(mine, OSError))])
    first = next(((rank, error) for rank, error in enumerate(errors) if error), None)
    if first is None:
        return
    rank, (text, lost) = first
    shared = len(set(errors)) == 1
    if mine is not None and shared and not isinstance(mine, SourceError):
        raise mine
    raise (RunFailed if lost else UserError)(text if shared else f"rank {rank}: {text}") from mine


@contextmanager
def one_line_errors(rank: int, world: int) -> Iterator[None]:
    """Errors of data, disk, network, loaders and other ranks become UserError or RunFailed with one line; a fault of
    this software keeps its type. With several processes the line names the rank.
    """
    where = f"rank {rank}: " if world > 1 else ""
    try:
        yield
    except (RunFailed, TooManyBadImages):
        # All processes find too many bad images at once, in the same words.
        raise
    except UserError as error:
        # Only one process may have read bad data; the others end silently.
        raise UserError(f"{where}{error}") from error
    except SourceError as error:
        raise RunFailed(f"{where}{error}") from None
    except OSError as error:
        name, reason = error.filename or "input or output", error.strerror or error
        raise RunFailed(f"{where}{name}: {reason}. Make room or choose another place. {GO_ON}") from None
    except RuntimeError as error:
        if death := death_of_loader(error):
            raise RunFailed(f"{where}{death} Then lower data.workers or data.prefetch. {GO_ON}") from None
        if world > 1 and (
            isinstance(error, DistError)
            or re.search("closed by peer|reset by peer|Broken pipe|Connection refused", str(error))
        ):
            raise RunFailed(f"another process of the run has ended; its own line says why. {GO_ON}") from None
        raise


@contextmanager
def one_line_out_of_memory(rank: int, world: int, remedy: Callable[[], str]) -> Iterator[None]:
    """Memory that is used up, on a GPU or a CPU, becomes RunFailed with one line, which ends with the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        where, reason = f"rank {rank}: " if world > 1 else "", " ".join(str(error).split())[:160].rstrip(".")
        raise RunFailed(f"{where}out of memory ({reason}). {remedy()}") from None


@contextmanager
def no_process_left() -> Iterator[None]:
    """End the loader processes that an error leaves behind. They ignore SIGTERM, with which Python would end them, so
    it would wait for ever.
    """
    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        listens = threading.current_thread() is threading.main_thread()
        # Torch's handler takes the end of a loader process for a failure.
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if listens else None
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
            child.join()
        if listens:
            signal.signal(signal.SIGCHLD, handler)
        raise
