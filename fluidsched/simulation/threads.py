"""What runs may take of the machine: processors for replications side by side, and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from fluidsched._processors import usable_threads

__all__ = ["available_memory", "in_threads"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None
) -> Iterator[Result]:
    """Yield `function(item)` in the order of the items, computed in parallel threads (None: `usable_threads`)."""
    items = list(items)
    threads = min(usable_threads() if threads is None else threads, max(len(items), 1))
    if threads == 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="fluidsched")
    try:
        for future in [pool.submit(function, item) for item in items]:
            yield future.result()
    finally:  # an interrupt ends the run after what is in progress
        pool.shutdown(wait=True, cancel_futures=True)


def available_memory() -> float:
    """Bytes that can be allocated without swapping; infinity where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return math.inf
