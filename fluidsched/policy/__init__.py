"""Policy tables: what a scheduler does, compiled from a fluid solution or taken from an engine."""

from __future__ import annotations

from fluidsched.policy import baselines
from fluidsched.policy.compiler import compile_policy, largest_load
from fluidsched.policy.table import Lookahead, Match, PolicyTable, Segment, TableType
from fluidsched.policy.wait import WaitCurve, wait_curve

__all__ = [
    "Lookahead",
    "Match",
    "PolicyTable",
    "Segment",
    "TableType",
    "WaitCurve",
    "baselines",
    "compile_policy",
    "largest_load",
    "wait_curve",
]
