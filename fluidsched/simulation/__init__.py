"""Simulation: policy tables on arrival paths, their records and measures.

`simulate` is the one verb. `reference` is the definition of every rule in plain Python; `records` is what an
engine leaves behind, `measures` what is read off it, `laws` what must hold in every run.
"""

from __future__ import annotations

from fluidsched.simulation.booking import booking_limit, nested_booking_limit
from fluidsched.simulation.records import STATUSES, EngineRun
from fluidsched.simulation.result import SimulationResult
from fluidsched.simulation.rules import Decision, UserRule
from fluidsched.simulation.run import simulate
from fluidsched.simulation.sorted_f import sorted_f
from fluidsched.simulation.timeline import PolicyTimeline, policy_timeline
from fluidsched.simulation.trajectory import FluidTrajectory, fluid_trajectory

__all__ = [
    "STATUSES",
    "Decision",
    "EngineRun",
    "FluidTrajectory",
    "PolicyTimeline",
    "SimulationResult",
    "UserRule",
    "booking_limit",
    "fluid_trajectory",
    "nested_booking_limit",
    "policy_timeline",
    "simulate",
    "sorted_f",
]
