"""Fixtures: sweeps in processes of their own, so that they can be killed; a Dask cluster for the session."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from sweep_processes import ENVIRONMENT, Start, dask_cluster


@pytest.fixture
def start() -> Iterator[Start]:
    """Start `python arguments…` where the cell functions can be imported; killed after the test."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(
            command,
            env=ENVIRONMENT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
            **options,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def dask_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Dask cluster that serves the whole session."""
    pytest.importorskip("distributed", reason="needs the extra dask")
    with dask_cluster(tmp_path_factory.mktemp("dask")) as (address, _):
        yield address
