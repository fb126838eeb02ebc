"""Whether a machine has room for loader processes: shared memory, in which tensors wait, and open files, by which they
are handed over.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from itertools import chain

import numpy as np

from multidomain_cct.data.batches.streams import DomainStreams
from multidomain_cct.errors import UserError

SHARED_MEMORY = "/dev/shm"
_HELD = 2
"""Items that the training process holds besides those that wait: the one in use, and the next."""
_SPARE_FILES = 48
"""Open files that are left for shards, checkpoints, logs and the loader of an evaluation."""


def tensor_bytes(streams: Sequence[DomainStreams], parts: int, *, together: bool) -> list[int]:
    """The size of each tensor of the largest micro-batch.

    `parts`: micro-batches of a step, over all processes; `together`: whether each holds images of every domain.
    """
    sizes = []
    for stream in streams:
        subsets = ("labelled", "unlabelled")
        labelled, unlabelled = (stream.batch(subset) // parts if stream.samples(subset) else 0 for subset in subsets)
        masks = 1 if stream.weak_source is None else 2
        pixels = np.array([3 * labelled, labelled, 3 * unlabelled, *[unlabelled] * masks])
        sizes.append((pixels * stream.crop[0] * stream.crop[1]).tolist())
    return list(chain.from_iterable(sizes)) if together else max(sizes, key=sum)


def require_room(sizes: Sequence[int], *, workers: int, prefetch: int) -> None:
    """Raises UserError when this machine has too little shared memory, or allows too few open files, for items of
    tensors with these sizes in bytes. A limit on open files that may be raised is raised.
    """
    if not workers:
        return
    waiting = workers * prefetch + _HELD
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, free = processes * waiting * sum(sizes), _free_bytes()
    if needed > free:
        gibibytes = 2 ** (2 * needed // 2**30).bit_length()
        raise UserError(
            f"data.workers is {workers} and data.prefetch {prefetch}: {waiting} batches that wait in {SHARED_MEMORY} "
            f"need {needed} bytes{f' for {processes} processes' if processes > 1 else ''}, and it has {free} free. "
            f"Lower data.prefetch or data.workers (0 needs none), or give a container more: --shm-size={gibibytes}g."
        )
    files = len(os.listdir("/dev/fd")) + waiting * len(sizes) + _SPARE_FILES
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY or allowed >= files:
        return
    if most == resource.RLIM_INFINITY or most >= files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    else:
        raise UserError(
            f"data.workers is {workers} and data.prefetch {prefetch}, for which {files} files are open at a time, and "
            f"{allowed} may be. Allow more: ulimit -n 1024; or set data.workers=0."
        )


def _free_bytes() -> float:
    try:
        room = os.statvfs(SHARED_MEMORY)
    except OSError:
        # No such folder: macOS shares memory otherwise.
        return float("inf")
    return room.f_bavail * room.f_frsize
