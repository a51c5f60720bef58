"""A durable map: every cell of a spec is computed once, written down, and never lost.

The main process takes runs of cells from the journal, hands them to an executor as *batches*, and appends
what comes back. A cell's record is the same whoever computes it, so batches may have any size; the size
balances two costs. Let c be the main process's time per batch (measured), s the time of a cell (measured),
W the number of workers. The main process keeps up while W/(b s) batches per second cost it a small share f
of its time,

    b s ≥ W c / f,                                                  (1)

and a killed sweep loses at most the batches in flight, so they should not be longer than needed. The target
for b s is the larger of `LEAST_BATCH_S` and the right side of (1) with f = `MAIN_SHARE`, and near the end b
shrinks so that the last batches finish together. At most `IN_FLIGHT` batches per worker are out at any
time: memory does not grow with the number of cells.

A batch whose worker dies runs again. One that was out at two deaths runs again alone, then cell by cell; a
single cell whose worker dies when nothing else runs is recorded as failed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import numpy as np

from fluidsched._processors import THREADS, processors
from fluidsched.errors import InputError, SimulationError
from fluidsched.sweeps.journal import Journal, are_plain, is_plain, record
from fluidsched.sweeps.spec import OWN_COLUMNS, Parameters, SweepSpec, resolve_function

__all__ = ["WorkerPool", "run_cells", "worker_pool"]

LEAST_BATCH_S = 0.5
MAIN_SHARE = 0.25
IN_FLIGHT = 2
MOST_BATCH = 512
MEMORY = 0.9  # weight of the past in the measured costs, per batch
POLL_S = 0.1  # how often to look whether the processes that share the directory have finished
MOST_STARTS = 3  # of worker processes that die before they finish anything

Progress: TypeAlias = Callable[[str, int, int], None]
Task: TypeAlias = tuple[int, Parameters, np.random.SeedSequence]

_resolve_once = lru_cache(maxsize=8)(resolve_function)


# -- what runs in a worker ------------------------------------------------------------------------------


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if not is_plain(value):
        required = "be a number, a string or None, whole numbers of 64 bits at most"
        raise InputError(f"result {name!r} of a cell", value, required)
    return value


def _encode(values: Any, reserved: Collection[str]) -> str:
    if not isinstance(values, Mapping):
        raise InputError("result of a cell", values, "be a mapping from names to numbers and strings")
    has_names = isinstance(values, dict) and {str}.issuperset(map(type, values))
    if not (has_names and are_plain(values.values())):
        values = {str(name): _plain(name, value) for name, value in values.items()}
    for name in reserved:
        if name in values:
            raise InputError("result of a cell", name, "not be called like another column of the table")
    return json.dumps(values, ensure_ascii=False)


def _run_batch(function: str, reserved: tuple[str, ...], tasks: list[Task]) -> tuple[list[bytes], float]:
    """Run the tasks; return their records and the seconds this took. An error of a cell is its record.

    What the cells returned is written out when all have run: one after the other the records find code and
    tables in the processor's caches, which between two simulations they do not, and take half the time.
    """
    start = time.perf_counter()
    compute = _resolve_once(function)
    found: list[tuple[int, Any, str | None]] = []
    for cell, parameters, seed in tasks:
        try:
            values = compute(parameters, seed)
            found.append((cell, dict(values) if isinstance(values, Mapping) else values, None))
        except Exception as error:
            found.append((cell, None, f"{type(error).__name__}: {error}"))
    lines = [
        _record(cell, values, reserved) if diagnosis is None else _failure(cell, diagnosis)
        for cell, values, diagnosis in found
    ]
    return lines, time.perf_counter() - start


def _record(cell: int, values: Any, reserved: Collection[str]) -> bytes:
    try:
        return record("done", cell, _encode(values, reserved))
    except Exception as error:
        return _failure(cell, f"{type(error).__name__}: {error}")


def _failure(cell: int, diagnosis: str) -> bytes:
    writable = diagnosis.encode("utf-8", "backslashreplace").decode()
    return record("failed", cell, json.dumps({"diagnosis": writable}, ensure_ascii=False))


def _begin_worker(lifeline: Connection, threads: int) -> None:
    """End with the main process, however it ends; leave Ctrl-C to it; take its share of the processors."""
    os.environ.setdefault(THREADS, str(threads))

    def end_with_main() -> None:
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv()
        os._exit(1)

    threading.Thread(target=end_with_main, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# -- executors ------------------------------------------------------------------------------------------


class _Here(Executor):
    """Runs a task when it is submitted, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class WorkerPool:
    """`workers` spawned processes that end with this one. `executor` is replaced by `restart`."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")
        self._far_end, self._lifeline = context.Pipe(duplex=False)
        self.executor = ProcessPoolExecutor(
            self.workers,
            mp_context=context,
            initializer=_begin_worker,
            initargs=(self._far_end, max(1, processors() // self.workers)),
        )

    def restart(self) -> None:
        self.stop(now=True)
        self._start()

    def stop(self, *, now: bool) -> None:
        """End the workers: `now` in the middle of what they do, else when they have done it."""
        if now:
            self._lifeline.close()
        self.executor.shutdown(wait=True, cancel_futures=True)
        self._lifeline.close()
        self._far_end.close()


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[WorkerPool]:
    """Processes to run cells, ended at once if the block is left by an exception."""
    pool = WorkerPool(workers)
    try:
        yield pool
    except BaseException:
        pool.stop(now=True)
        raise
    pool.stop(now=False)


# -- the main process -----------------------------------------------------------------------------------


@dataclass
class _Batch:
    cells: range
    deaths: int = 0  # of workers while it was out


class _Costs:
    """Running means of the time of a cell and of the main process's time per batch, s."""

    def __init__(self) -> None:
        self._cells = self._cell_s = self._batches = self._main_s = 0.0

    def add_batch(self, cells: int, seconds: float) -> None:
        self._cells = MEMORY * self._cells + cells
        self._cell_s = MEMORY * self._cell_s + seconds

    def add_main(self, batches: int, seconds: float) -> None:
        self._batches = MEMORY * self._batches + batches
        self._main_s = MEMORY * self._main_s + seconds

    def batch_size(self, workers: int, free: int) -> int:
        if self._cells == 0.0:
            return 1
        main_s = self._main_s / self._batches if self._batches else 0.0
        target = max(LEAST_BATCH_S, workers * main_s / MAIN_SHARE)
        size = math.ceil(target * self._cells / self._cell_s) if self._cell_s > 0.0 else MOST_BATCH
        return max(1, min(size, MOST_BATCH, free // (IN_FLIGHT * workers)))


class _Run:
    """State of the main process: what is out, what is lost, what things cost."""

    def __init__(
        self,
        spec: SweepSpec,
        journal: Journal,
        executor: Executor | WorkerPool | None,
        workers: int,
        progress: Progress | None,
    ) -> None:
        self.spec, self.journal, self.progress = spec, journal, progress
        self.pool = executor if isinstance(executor, WorkerPool) else None
        self.executor = executor.executor if isinstance(executor, WorkerPool) else executor or _Here()
        self.here = executor is None
        self.workers = 1 if self.here else workers
        self.window = 1 if self.here else IN_FLIGHT * workers
        self.reserved = (*OWN_COLUMNS, *spec.columns)
        self.costs = _Costs()
        self.out: dict[Future[Any], _Batch] = {}
        self.ended: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self.lost: deque[_Batch] = deque()  # to run again
        self.suspects: deque[_Batch] = deque()  # to run again, each alone
        self.alone = False  # whether a suspect is out
        self.broken = False  # whether the pool has to be replaced
        self.starts = 0  # of the pool since a batch last came back

    def go(self) -> None:
        self._report()
        while True:
            start = time.perf_counter()
            self._fill()
            filled = time.perf_counter()
            if not self.out:
                if not self.broken and self.journal.refresh():
                    return
                self._report()
                time.sleep(POLL_S)  # others are at the last cells, or the pool has to be replaced
                continue
            ended = [self.ended.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    ended.append(self.ended.get_nowait())
            woken = time.perf_counter()
            run_s = self._collect(ended)
            main_s = filled - start + time.perf_counter() - woken
            self.costs.add_main(len(ended), main_s - (run_s if self.here else 0.0))
            self._report()

    def cancel(self) -> None:
        for future in self.out:
            future.cancel()

    def _report(self) -> None:
        if self.progress is not None:
            self.progress("cells", self.journal.done + self.journal.failed, len(self.spec))

    # -- handing out ------------------------------------------------------------------------------------

    def _fill(self) -> None:
        if self.broken and self.pool is not None:
            if self.out:
                return  # every future of a broken pool comes back by itself
            self.starts += 1
            if self.starts > MOST_STARTS:
                raise SimulationError(
                    "worker processes die before they finish a single cell; their own messages say why. "
                    'A script that starts workers needs `if __name__ == "__main__":` around what it does'
                )
            self.pool.restart()
            self.executor = self.pool.executor
            self.broken = False
        while len(self.out) < self.window and not self.broken:
            batch = self._next()
            if batch is None:
                return
            self._submit(batch)

    def _next(self) -> _Batch | None:
        if self.alone and self.out:
            return None
        self.alone = False
        if self.lost:
            return self.lost.popleft()
        cells = self.journal.claim(self.costs.batch_size(self.workers, self.journal.free))
        if cells is not None:
            return _Batch(cells)
        if self.suspects and not self.out:
            self.alone = True
            return self.suspects.popleft()
        return None

    def _submit(self, batch: _Batch) -> None:
        tasks = [(i, self.spec.parameters(i), self.spec.seed_sequence(i)) for i in batch.cells]
        try:
            future = self.executor.submit(_run_batch, str(self.spec.function), self.reserved, tasks)
        except RuntimeError as error:  # broken, or shut down
            if self.pool is None:
                raise self._breakdown(error) from error
            self.lost.append(batch)
            self.broken = True
        else:
            self.out[future] = batch
            future.add_done_callback(self.ended.put)

    # -- taking in --------------------------------------------------------------------------------------

    def _collect(self, futures: list[Future[Any]]) -> float:
        """Write down what came back, at once; return the seconds it took to compute."""
        lines: list[bytes] = []
        seconds = 0.0
        breakdown: BaseException | None = None
        for future in futures:
            batch = self.out.pop(future)
            try:
                batch_lines, batch_s = future.result()
            except (BrokenExecutor, CancelledError) as error:
                if self.pool is None:
                    breakdown = error
                else:
                    self.broken = True
                    lines += self._died(batch)
            except Exception as error:
                if type(error).__name__ == "KilledWorker":  # Dask's word for tasks whose workers keep dying
                    lines += self._died(batch)
                else:
                    breakdown = error
            else:
                lines += batch_lines
                seconds += batch_s
                self.costs.add_batch(len(batch.cells), batch_s)
        if lines:
            self.journal.append(lines)
            self.starts = 0
        if breakdown is not None:
            raise self._breakdown(breakdown) from breakdown
        return seconds

    def _died(self, batch: _Batch) -> list[bytes]:
        """Put a batch whose worker died back; return the record of a cell that is to blame."""
        batch.deaths += 1
        if batch.deaths == 1:
            self.lost.append(batch)
        elif batch.deaths == 2:
            self.suspects.append(batch)
        elif len(batch.cells) > 1:
            self.suspects.extend(_Batch(range(cell, cell + 1), deaths=2) for cell in batch.cells)
        else:
            return [
                _failure(batch.cells[0], "the worker process died each time it ran this cell, at last alone")
            ]
        return []

    def _breakdown(self, error: BaseException) -> SimulationError:
        kept = f"{self.journal.done + self.journal.failed:,} of {len(self.spec):,} cells are kept"
        remedy = "run the same sweep in the same directory to go on"
        return SimulationError(f"the executor broke down ({type(error).__name__}: {error}). {kept}; {remedy}")


def run_cells(
    spec: SweepSpec,
    journal: Journal,
    executor: Executor | WorkerPool | None,
    workers: int,
    progress: Progress | None,
) -> None:
    """Run the cells that the journal lacks, here (None) or on an executor that runs `workers` tasks at once.

    Returns when every cell has ended, those of other processes on the same journal included.

    Raises
    ------
    SimulationError
        If the executor breaks down or the disk takes no more; the journal is valid and the sweep can go on.
    """
    run = _Run(spec, journal, executor, workers, progress)
    try:
        run.go()
    finally:
        run.cancel()
