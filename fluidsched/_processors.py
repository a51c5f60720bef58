"""How many processors and threads a process may use."""

from __future__ import annotations

import os

from fluidsched.errors import InputError

__all__ = ["THREADS", "processors", "usable_threads"]

THREADS = "FLUIDSCHED_THREADS"
"""Environment variable: how many threads a process may use at most. A sweep's workers share the processors by it."""


def processors() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_threads() -> int:
    """Threads worth starting: one per processor, at most what the environment allows.

    Raises
    ------
    InputError
        If the environment variable is no whole number of at least 1.
    """
    given = os.environ.get(THREADS)
    if given is None:
        return processors()
    if not (given.isascii() and given.isdecimal()) or int(given) < 1:
        raise InputError(
            THREADS, given, "be a whole number of at least 1", "It is read from the environment; unset it."
        )
    return min(int(given), processors())
