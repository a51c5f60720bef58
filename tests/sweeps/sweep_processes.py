"""Processes for the tests: where cell functions can be imported, and a real Dask cluster on loopback."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent.parent}"}

Start = Callable[..., "subprocess.Popen[str]"]


@contextlib.contextmanager
def dask_cluster(folder: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A Dask scheduler and two workers of one thread on 127.0.0.1: the address and the processes."""
    from distributed import Client

    address_file = folder / "scheduler.json"
    common = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(address_file)]
    scheduler = ["-m", "distributed.cli.dask_scheduler", *common, "--port", "0"]
    worker = ["-m", "distributed.cli.dask_worker", *common, "--nthreads", "1", "--no-nanny"]
    with open(folder / "log", "w") as log:
        processes = [
            subprocess.Popen(
                [sys.executable, *command], env=ENVIRONMENT, cwd=folder, stdout=log, stderr=subprocess.STDOUT
            )
            for command in (scheduler, worker, worker)
        ]
    try:
        deadline = time.monotonic() + 60
        while not address_file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        with Client(scheduler_file=str(address_file), timeout=60) as client:
            client.wait_for_workers(2, timeout=60)
            address = client.scheduler.address
        yield address, processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
