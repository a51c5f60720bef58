"""The fluid model: the linear program, its solution with duals and certificate, closed forms."""

from __future__ import annotations

from fluidsched.fluid.coefficients import block_kv_work, busy_work
from fluidsched.fluid.program import FluidProgram, solve_fluid
from fluidsched.fluid.solution import FluidSolution

__all__ = ["FluidProgram", "FluidSolution", "block_kv_work", "busy_work", "solve_fluid"]
