"""Cell functions for the tests: quick, and bad in the ways real ones can be."""

from __future__ import annotations

import math
import os
import signal
import time
from typing import Any

import numpy as np

from fluidsched._processors import usable_threads


def draw(parameters: dict[str, Any], seed: np.random.SeedSequence) -> dict[str, Any]:
    """A random number that depends on the cell's seed, after `seconds` of sleep."""
    time.sleep(parameters.get("seconds", 0.0))
    generator = np.random.default_rng(seed)
    return {
        "value": generator.standard_normal() + parameters["x"],
        "count": int(generator.poisson(5.0)),
        "pid_free": "ä,b",
    }


def sometimes_failing(parameters: dict[str, Any], seed: np.random.SeedSequence) -> dict[str, Any]:
    """Fails for odd x while the file named by `broken` exists; NaN and infinity otherwise."""
    if parameters["x"] % 2 and os.path.exists(parameters["broken"]):
        raise ValueError(f"x = {parameters['x']} is odd")
    return {"value": math.nan if parameters["x"] == 0 else math.inf}


def deadly(parameters: dict[str, Any], seed: np.random.SeedSequence) -> dict[str, Any]:
    """Kills its process where x is 3."""
    if parameters["x"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"value": parameters["x"]}


def busy(parameters: dict[str, Any], seed: np.random.SeedSequence) -> dict[str, Any]:
    """Computes for `seconds` of this process's time."""
    end = time.process_time() + parameters["seconds"]
    generator = np.random.default_rng(seed)
    total = 0.0
    while time.process_time() < end:
        total = float(generator.standard_normal(1000).sum())
    return {
        "drawn": generator.bit_generator.state["bit_generator"],
        "x2": parameters["x"] * 2,
        "any": total * 0.0,
    }


_kept: dict[str, float] = {}


def one_mapping(parameters: dict[str, Any], seed: np.random.SeedSequence) -> dict[str, float]:
    """Returns the same mapping every time, with other values."""
    _kept["value"] = parameters["x"]
    return _kept


def threads(parameters: dict[str, Any], seed: np.random.SeedSequence) -> dict[str, int]:
    """How many threads a simulation in this cell would start."""
    return {"threads": usable_threads()}
