"""Policy tables: what a scheduler does, compiled from a fluid solution or taken from an engine."""

from __future__ import annotations

from fluidsched.policy import baselines
from fluidsched.policy.table import Lookahead, Match, PolicyTable, Segment, TableType

__all__ = ["Lookahead", "Match", "PolicyTable", "Segment", "TableType", "baselines"]
