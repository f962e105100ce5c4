"""How the process handles the memory that it frees. Knows nothing of what it is used for."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGE = 1 << 30  # bytes; one such block still goes back to the system at once


def keep_freed_memory() -> None:
    """Keeps freed blocks for the next ones instead of giving them back to the system; does nothing without glibc.

    A training step on the CPU frees its activations and takes the same memory again. By default glibc hands blocks of
    that size back each time, and the system clears every page of them anew: a fifth of a small model's step. The
    process then stays at the largest size that it has had.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, LARGE)
