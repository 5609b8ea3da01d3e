"""Allocator: freed memory stays with the process, instead of going back to the system after every layer.

glibc gives blocks above a threshold back at once, so each activation of an image tower costs the kernel's zeroed pages
anew: two fifths of image encoding's time. With both thresholds raised they are used again; results are the same bytes,
and the process holds its peak until it ends (docs/benchmarks.md).
"""

import ctypes
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Of glibc's malloc.h."""
_BLOCK, _TOP = 1 << 30, (1 << 31) - 1
"""Bytes: the largest block that is kept, and how much may lie free at the end."""


def keep_freed_memory(library: Any = None) -> bool:
    """Whether the C library took both thresholds; one without `mallopt` (macOS, musl) stays as it is."""
    try:
        mallopt = (library or ctypes.CDLL(None)).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Other threads' arenas hold 64 MB at most and go back to the system when they are empty, so all share the first.
    wanted = {_MMAP_THRESHOLD: _BLOCK, _TRIM_THRESHOLD: _TOP, _ARENA_MAX: 1}
    return all(bool(mallopt(which, value)) for which, value in wanted.items())
