"""The fluid model: the linear program, its solution with duals and certificate, how both move, closed forms."""

from __future__ import annotations

from fluidsched.fluid.capacity import CapacityPlan, plan_capacity, plan_load
from fluidsched.fluid.coefficients import block_kv_work, busy_work, chunk_overhead
from fluidsched.fluid.demand import demand_rates, sinusoidal_rates
from fluidsched.fluid.fair import FairSolution, progressive_filling, solve_fair
from fluidsched.fluid.pools import Pool, PoolsSolution, solve_pools
from fluidsched.fluid.program import FluidProgram, solve_fluid
from fluidsched.fluid.region import StabilityRegion, stability_region
from fluidsched.fluid.sensitivity import RateSweep, ranging, sweep_load, sweep_rates
from fluidsched.fluid.solution import FluidSolution
from fluidsched.fluid.transient import solve_transient
from fluidsched.fluid.transient_solution import TransientSolution
from fluidsched.fluid.variables import FluidVariables, VariablesOptimum, fluid_variables

__all__ = [
    "CapacityPlan",
    "FairSolution",
    "FluidProgram",
    "FluidSolution",
    "FluidVariables",
    "Pool",
    "PoolsSolution",
    "RateSweep",
    "StabilityRegion",
    "TransientSolution",
    "VariablesOptimum",
    "block_kv_work",
    "busy_work",
    "chunk_overhead",
    "demand_rates",
    "fluid_variables",
    "plan_capacity",
    "plan_load",
    "progressive_filling",
    "ranging",
    "sinusoidal_rates",
    "solve_fair",
    "solve_fluid",
    "solve_pools",
    "solve_transient",
    "stability_region",
    "sweep_load",
    "sweep_rates",
]
