"""Where compiled loops are kept between processes: numba's cache, which may fail without failing the run.

numba keeps machine code beside the source file, in the user's cache folder or in NUMBA_CACHE_DIR. As it stands an
import ends in an error if none of them can be written, and a run if the disk is full or a file in there was cut off.
Here each of these is a warning, and the loop is compiled in the process that needs it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit
from numba.core.caching import FunctionCache

__all__ = ["cached"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_log = logging.getLogger(__name__)

REMEDY = (
    "The simulator is compiled in every process, in half a minute. Set NUMBA_CACHE_DIR to a folder of yours."
)


class _ForgivingCache(FunctionCache):
    """A cache that says what went wrong in it and is none then."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except Exception as error:  # damaged code can raise anything while it is read
            _log.warning("%s holds damaged code (%s): compiling anew", self.cache_path, error)
            self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]
        except OSError as error:
            _log.warning("cannot write to %s (%s). %s", self.cache_path, error.strerror, REMEDY)

    def flush(self) -> None:
        with contextlib.suppress(OSError):  # said when the code is saved
            super().flush()  # type: ignore[no-untyped-call]


def cached(function: _Function, options: dict[str, Any]) -> _Function:
    """Compile with these options of numba's `njit`, and keep the code if there is a place for it."""
    loop: Any = njit(**options)(function)
    if loop is function:  # NUMBA_DISABLE_JIT
        return function
    try:
        loop._cache = _ForgivingCache(function)  # type: ignore[no-untyped-call]
    except RuntimeError:
        _say_that_no_folder_can_be_written()
    compiled: _Function = loop
    return compiled


@functools.cache
def _say_that_no_folder_can_be_written() -> None:
    """Once for all loops."""
    _log.warning("no folder for compiled code can be written. %s", REMEDY)
