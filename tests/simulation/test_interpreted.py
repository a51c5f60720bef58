"""The compiled loops as plain Python: what numba accepts, NumPy alone runs to the same records."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from fluidsched.simulation import compiled

PROGRAM = """
import warnings

warnings.simplefilter("error")
import fluidsched as fs

path = fs.ArrivalPath.from_arrays([0.0, 0.0, 0.5, 1.0, 1.0], [4, 9, 2, 7, 1], [5, 2, 8, 1, 3])
server = fs.Server(24, fs.IterationTime.affine(0.25, 0.0, 2**-6, 2**-8))
for table in (fs.baselines.vllm(), fs.baselines.vllm_v0(), fs.baselines.sarathi()):
    runs = [fs.simulate(path, server, [table], horizon=64.0, warmup=0.0, engine=engine).requests(table.name)
            for engine in ("kernel", "reference")]
    assert runs[0].equals(runs[1]), table.name
    assert (runs[0]["status"] == "finished").all()
"""


def test_interpreted_loops_equal_the_reference() -> None:
    """With numba switched off the kernel runs, without a warning, and serves as the reference does."""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_no_field_hides_behind_an_attribute_of_numpy() -> None:
    """A record's `size` is NumPy's where the loops are interpreted: gated tables once forgot admissions there."""
    types = [value for value in vars(compiled).values() if isinstance(value, np.dtype)]
    fields = {name for kind in types for name in kind.names or ()}
    assert len(types) > 10
    assert not fields & set(dir(np.record))
