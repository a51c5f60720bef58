"""The fluid model: the linear program, its solution with duals and certificate, how both move, closed forms."""

from __future__ import annotations

from fluidsched.fluid.coefficients import block_kv_work, busy_work, chunk_overhead
from fluidsched.fluid.program import FluidProgram, solve_fluid
from fluidsched.fluid.sensitivity import RateSweep, ranging, sweep_load, sweep_rates
from fluidsched.fluid.solution import FluidSolution

__all__ = [
    "FluidProgram",
    "FluidSolution",
    "RateSweep",
    "block_kv_work",
    "busy_work",
    "chunk_overhead",
    "ranging",
    "solve_fluid",
    "sweep_load",
    "sweep_rates",
]
