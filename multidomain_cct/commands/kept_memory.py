"""Memory that stays with the process once it is freed.

The C library gives large blocks back to the system as soon as they are freed, and the system clears each page of the
next ones before they can be written. A training step on a CPU takes and frees the same megabytes again and again, and
so spends up to a fifth of its time on pages (docs/speed.md).
"""

from __future__ import annotations

import ctypes
import platform

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process, and those forked from it, reuse the memory that they free, and say whether that was possible:
    it is with glibc.

    A process then never shrinks below its peak.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    c_library = ctypes.CDLL(None)
    never = -1
    return bool(c_library.mallopt(_M_MMAP_MAX, 0) and c_library.mallopt(_M_TRIM_THRESHOLD, never))
