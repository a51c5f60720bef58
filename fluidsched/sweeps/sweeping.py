"""The public verb: run a spec's cells in a directory, or go on where an earlier run stopped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any

import numpy as np

import fluidsched
from fluidsched._checks import check_count
from fluidsched._files import fingerprint, make_directory
from fluidsched._processors import processors
from fluidsched.errors import InputError, SimulationError
from fluidsched.sweeps.journal import Journal
from fluidsched.sweeps.results import Format, SweepResult, choose_format, write_result
from fluidsched.sweeps.running import Progress, run_cells, worker_pool
from fluidsched.sweeps.spec import Parameters, SweepSpec

__all__ = ["sweep"]


def sweep(
    spec: SweepSpec | Mapping[str, Any] | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    executor: Executor | None = None,
    workers: int | None = None,
    join: bool = False,
    retry_failed: bool = False,
    format: Format = "auto",
    progress: Progress | None = None,
) -> SweepResult:
    """Run every cell of a spec once, keep each result at once, and write one table.

    The directory holds the journal (``journal.txt``), and when every cell has ended the table
    (``cells.parquet`` or ``cells.csv``) and ``manifest.json``. Calling `sweep` again with the same spec and
    directory goes on where the last run stopped, however it stopped: at most the cells in flight are
    computed again, and the table has the bytes an undisturbed run would have written, for any executor and
    number of workers.

    Parameters
    ----------
    spec : SweepSpec, mapping or path
        What to run; a mapping has the fields of a `SweepSpec`, a path names a TOML file with them.
    directory : path-like
        Where journal and table go; made if its parent exists. It serves one spec only.
    executor : concurrent.futures.Executor, optional
        Where cells run: a pool of processes, or a Dask cluster through
        ``Client(address).get_executor(pure=False)``. None: `workers` processes, or in this one.
    workers : int, optional
        Without `executor`: processes to start (the caller's main module is imported in each, so a script
        needs its ``if __name__ == "__main__":``); they are replaced when they die. They share the processors:
        with at least as many workers as processors, each runs a cell's replications one after the other. With
        `executor`: tasks it runs at once; default what it says, or the number of processors.
    join : bool
        If another process is at work in the directory: share the cells with it, instead of an error. Works on
        file systems with `flock`, network file systems included where they support it.
    retry_failed : bool
        Run cells again that have failed before.
    format : {"auto", "parquet", "csv"}
        Of the table. "auto": Parquet where pyarrow is installed (extra `parquet`), else CSV.
    progress : callable, optional
        Called as progress("cells", ended, total) in this process.

    Returns
    -------
    SweepResult
        With `to_frame()`: one row per cell. A cell that raised an exception is a row with status "failed" and
        its diagnosis, not an error of the sweep.

    Raises
    ------
    InputError
        If the spec is wrong, the directory holds another sweep (or one made by another version of the
        library), or another process is at work there and `join` is false.
    SimulationError
        If the disk is full or the executor breaks down. The journal stays valid: call again to go on.

    Examples
    --------
    >>> import tempfile
    >>> from fluidsched.sweeps import sweep
    >>> spec = {"grid": {"x": [1, 2], "y": [10, 20]}, "function": "fluidsched.sweeps.sweeping:example_cell"}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     result = sweep(spec, directory, format="csv")
    ...     print(result.path.read_text(), end="")
    cell,x,y,status,diagnosis,product
    0,1,10,done,,10
    1,1,20,done,,20
    2,2,10,done,,20
    3,2,20,done,,40
    """
    if isinstance(spec, Mapping):
        spec = SweepSpec.from_dict(spec)
    elif not isinstance(spec, SweepSpec):
        spec = SweepSpec.from_toml(spec)
    if executor is not None and not isinstance(executor, Executor):
        raise InputError("executor", executor, "be a concurrent.futures.Executor")
    if workers is not None:
        workers = check_count("workers", workers, minimum=1)
    table_format = choose_format(format)
    place = make_directory("directory", directory)
    version = fluidsched.__version__
    header = spec.to_dict() | {"version": version, "fingerprint": fingerprint([spec.fingerprint, version])}
    with contextlib.ExitStack() as stack:
        try:
            journal = stack.enter_context(
                Journal(place, header, len(spec), join=join, retry_failed=retry_failed)
            )
            if executor is None and workers is not None:
                pool = stack.enter_context(worker_pool(workers))
                run_cells(spec, journal, pool, workers, progress)
            else:
                run_cells(spec, journal, executor, workers or _concurrency(executor), progress)
            path = write_result(spec, journal, place, table_format)
        except OSError as error:
            remedy = "What is finished is kept; run the same sweep there to go on"
            raise SimulationError(
                f"the sweep in {place} stopped: {error.strerror or error}. {remedy}"
            ) from error
        return SweepResult(spec, path, len(spec), journal.failed)


def _concurrency(executor: Executor | None) -> int:
    """How many tasks an executor runs at once, as far as it tells."""
    told = getattr(executor, "_max_workers", None)
    return told if isinstance(told, int) else processors()


def example_cell(parameters: Parameters, seed: np.random.SeedSequence) -> dict[str, Any]:
    """The cell of the example: a cell function takes the cell's parameters and its randomness."""
    return {"product": parameters["x"] * parameters["y"]}
