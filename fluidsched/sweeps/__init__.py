"""Sweeps: every cell of a grid or list, computed once and never lost, on one machine or a cluster."""

from fluidsched.sweeps.results import SweepResult
from fluidsched.sweeps.spec import SweepSpec
from fluidsched.sweeps.sweeping import sweep

__all__ = ["SweepResult", "SweepSpec", "sweep"]
