"""Simulation: from a policy table and arrival paths to records and measures."""

from __future__ import annotations

from fluidsched.simulation.records import STATUSES, EngineRun

__all__ = ["STATUSES", "EngineRun"]
