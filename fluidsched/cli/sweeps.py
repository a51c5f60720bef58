"""`fluidsched sweep`: a durable map over cells."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fluidsched import _files
from fluidsched.cli.options import Shown
from fluidsched.cli.outputs import EXIT_INTERRUPTED, EXIT_NO_ANSWER, emit, leave, progress_bar
from fluidsched.errors import InputError

if TYPE_CHECKING:
    from concurrent.futures import Executor


def sweep(
    shown: Shown,
    spec: Annotated[Path, typer.Argument(help="A TOML file with grid, cells, base and seed of the sweep.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory of the sweep; the same command goes on there.")
    ],
    workers: Annotated[int | None, typer.Option(help="Worker processes (default: all in this one).")] = None,
    dask: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on the Dask cluster of this scheduler, tcp://…")
    ] = None,
    join: Annotated[
        bool, typer.Option("--join", help="Share the cells with a sweep that is at work in the directory.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run cells that failed again.")
    ] = False,
    function: Annotated[
        str, typer.Option(metavar="MODULE:NAME", help="A cell function of your own, importable here.")
    ] = "simulate",
    table_format: Annotated[
        str, typer.Option("--format", help="parquet, csv, or auto: Parquet where pyarrow is installed.")
    ] = "auto",
) -> None:
    """Simulate every cell of a grid or list, keep each result at once, and write one table.

    Stopped in any way, the same command goes on where it was; the table does not depend on what ran it.

    Example:

    fluidsched sweep loads.toml --out loads --workers 4

    with these four lines as loads.toml:

    base.server = { gpu = "a100-80gb", model = "llama-2-7b" }

    base.workload = "azure_conv"

    base.horizon = 600

    grid = { workload.load = [0.6, 0.8], policy = ["vllm", "capped"] }
    """
    from fluidsched.sweeps import SweepSpec
    from fluidsched.sweeps import sweep as run

    if dask is not None and workers is not None:
        raise InputError("--workers", str(workers), "be left out with --dask", "The cluster has its own.")
    try:
        with _dask_executor(dask) as (executor, tasks_at_once), progress_bar(shown.quiet) as progress:
            result = run(
                SweepSpec.from_toml(spec, function),
                out,
                executor=executor,
                workers=tasks_at_once or workers,
                join=join,
                retry_failed=retry_failed,
                format=table_format,  # type: ignore[arg-type]  # any other word is refused by sweep itself
                progress=progress,
            )
    except KeyboardInterrupt:
        leave(
            f"interrupted; finished cells are kept, the same command goes on in {out} with the rest.",
            EXIT_INTERRUPTED,
        )
    answer = {"table": str(result.path), "cells": result.cells, "failed": result.failed}
    emit(_files.dumps(answer) if shown.as_json else repr(result))
    if result.failed and not shown.quiet:
        print(
            "Failed cells have their diagnosis in the table; --retry-failed runs them again.", file=sys.stderr
        )
    if result.failed == result.cells:
        raise SystemExit(EXIT_NO_ANSWER)


@contextmanager
def _dask_executor(address: str | None) -> Iterator[tuple[Executor | None, int | None]]:
    """An executor on a Dask cluster and the tasks it runs at once; without an address (None, None)."""
    if address is None:
        yield None, None
        return
    try:
        from distributed import Client
    except ImportError:
        raise InputError("--dask", address, "come with Dask installed", "Install fluidsched[dask].") from None
    try:
        client = Client(address, timeout=5)
    except (OSError, ValueError) as error:
        raise InputError(
            "--dask", f"{address} ({error})", "be the address of a Dask scheduler that answers"
        ) from None
    with client:
        yield client.get_executor(pure=False), max(1, sum(client.nthreads().values()))
