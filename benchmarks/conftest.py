"""What every benchmark records beside its times: machine, versions, seed, and whether the answer was right."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import scipy

import fluidsched

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real traces (`FLUIDSCHED_TEST_DATA`, default ../shared/data); skips where absent, fails where
    they are required (`.ci/run`)."""
    root = Path(os.environ.get("FLUIDSCHED_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not root.is_dir():
        message = f"real data not found at {root}; set FLUIDSCHED_TEST_DATA to the folder that holds traces/"
        if os.environ.get("FLUIDSCHED_REQUIRE_DATA"):
            pytest.fail(message)
        pytest.skip(message)
    return root


@pytest.fixture
def note(benchmark: Any) -> Callable[..., None]:
    """Write facts next to the times in the JSON file: `note(seed=1, right=True, requests=5000)`."""

    def write(**facts: Any) -> None:
        benchmark.extra_info.update(
            fluidsched=fluidsched.__version__,
            python=platform.python_version(),
            numpy=np.__version__,
            scipy=scipy.__version__,
            numba=numba.__version__,
            machine=platform.machine(),
            processors=os.cpu_count(),
            **facts,
        )
        best = benchmark.stats.stats.min if benchmark.stats else None
        if best and "requests" in facts:
            benchmark.extra_info["requests_per_second"] = facts["requests"] / best

    return write
