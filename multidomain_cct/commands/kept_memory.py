"""Keep freed memory in the process.

The C library returns large blocks to the system as soon as they are freed, and the system clears every page of the next
ones. A training step on a CPU allocates and frees the same megabytes again and again: up to a fifth of its time goes
into such pages (docs/speed.md).
"""

from __future__ import annotations

import ctypes
import platform

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process, and those forked from it, reuse freed memory; False without glibc, where it has no effect.

    The process then never shrinks below its peak.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    c_library = ctypes.CDLL(None)
    return bool(c_library.mallopt(_M_MMAP_MAX, 0) and c_library.mallopt(_M_TRIM_THRESHOLD, -1))
