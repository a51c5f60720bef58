"""What serves the requests: KV memory, limits, and how long an iteration takes."""

from __future__ import annotations

from fluidsched.server.calibration import Calibration, calibrate
from fluidsched.server.iteration import BatchSummary, IterationTime
from fluidsched.server.pool import Pool
from fluidsched.server.server import Server

__all__ = ["BatchSummary", "Calibration", "IterationTime", "Pool", "Server", "calibrate"]
