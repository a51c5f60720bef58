"""Policy tables: what a scheduler does, compiled from a fluid solution or taken from an engine."""

from __future__ import annotations

from fluidsched.policy import baselines
from fluidsched.policy.adaptation import Adaptation, adapt
from fluidsched.policy.compiler import ReachCurve, compile_policy, largest_load, reach_curve
from fluidsched.policy.nested_wait import SegmentCurve, segment_curve
from fluidsched.policy.table import Lookahead, Match, PolicyTable, Segment, TableType
from fluidsched.policy.wait import WaitCurve, wait_curve

__all__ = [
    "Adaptation",
    "Lookahead",
    "Match",
    "PolicyTable",
    "ReachCurve",
    "Segment",
    "SegmentCurve",
    "TableType",
    "WaitCurve",
    "adapt",
    "baselines",
    "compile_policy",
    "largest_load",
    "reach_curve",
    "segment_curve",
    "wait_curve",
]
