"""What ends a run: errors that become one line, and processes that must not outlive it."""

from __future__ import annotations

import multiprocessing
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed import DistError

from multidomain_cct.data.batches.bad_images import TooManyBadImages
from multidomain_cct.data.shards.download import SourceError
from multidomain_cct.errors import UserError

GO_ON = "The run goes on from its last checkpoint with resume=auto."


class RunFailed(RuntimeError):
    """A run that cannot go on, for a reason that is not the user's mistake. The message is one line."""


@contextmanager
def mistakes_in_common(accelerator: Accelerator) -> Iterator[None]:
    """Mistakes that one process finds become an error in all of them, so that none waits for the others.

    An error that not all of them share names the rank. A file that cannot be fetched, or read by some of them only, is
    RunFailed.
    """
    own: UserError | OSError | None = None
    try:
        yield
    except (UserError, OSError) as error:
        own = error
    found: list[tuple[str, bool] | None] = gather_object(
        [None if own is None else (str(own), isinstance(own, OSError))]
    )
    first = next((rank for rank, trouble in enumerate(found) if trouble is not None), None)
    if first is None or (trouble := found[first]) is None:
        return
    text, lost = trouble
    shared = len(set(found)) == 1
    if own is not None and shared and not isinstance(own, SourceError):
        raise own
    raise (RunFailed if lost else UserError)(text if shared else f"rank {first}: {text}") from own


@contextmanager
def one_line_errors(rank: int, world: int) -> Iterator[None]:
    """Errors of data, disk, network, loaders and other ranks as UserError or RunFailed with one line; what is a fault
    of this software passes as it is.

    With several processes the line begins with the rank, unless it tells of another rank's end.
    """
    where = f"rank {rank}: " if world > 1 else ""
    try:
        yield
    except (RunFailed, TooManyBadImages):
        # All processes find too many bad images at once, in the same words.
        raise
    except UserError as error:
        # One process's data may be at fault; the others end without a word of their own.
        raise UserError(f"{where}{error}") from error
    except SourceError as error:
        raise RunFailed(f"{where}{error}") from None
    except OSError as error:
        raise RunFailed(
            f"{where}{error.filename or 'input or output'}: {error.strerror or error}. Make room or choose another "
            f"place. {GO_ON}"
        ) from None
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if text.startswith("DataLoader worker (pid"):
            raise RunFailed(
                f"{where}a loader process died: {text.split('. ')[0]}. Was it killed for want of memory? Then lower "
                f"data.workers or data.prefetch. {GO_ON}"
            ) from None
        if world > 1 and (
            isinstance(error, DistError)
            or re.search("closed by peer|reset by peer|Broken pipe|Connection refused", text)
        ):
            raise RunFailed(f"another process of the run has ended; its own line says why. {GO_ON}") from None
        raise


@contextmanager
def no_process_left() -> Iterator[None]:
    """End the loader processes that an error leaves behind: they ignore SIGTERM, by which Python would end them, and it
    would wait for them for ever.
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
