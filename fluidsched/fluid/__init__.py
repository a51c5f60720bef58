"""The fluid model: the linear program, its solution with duals and certificate, how both move, closed forms.

The program (module `model`) describes an equilibrium of mean rates: type j is admitted at a_j requests per second,
each in the batch for S_j iterations, u iterations per second, hence Σ a_j W_j / u tokens of KV by Little's law.

**What its optimum bounds.** The iteration time T is convex, so the mean iteration lasts at least T of the mean batch,
and time, KV, batch and token rows hold for the long-run averages of any policy, whether it idles, pauses, chunks or
preempts. The optimum therefore bounds the long-run reward of every policy, provided that

(a) each type has one pair of lengths, or no policy completes requests of a type selectively by their length: a
    policy that serves the short ones only has another mix (split such types);
(b) coefficients of T are non-negative, bases apart, and computing a request's KV again takes no less than the decodes
    it replaces, c_pf L + c_attn L²/2 ≥ c_dec + c_kv L for every length L (true of all servers of the catalog, with
    equality in the two-parameter model T = d0 + d1·KV);
(c) W and w are those of whole prompts and a request is in the batch for S = o iterations. With `chunk_tokens` the
    program charges what chunks add, and bounds only servers that reach that chunk;
(d) no KV is shared between requests, beyond the cached prefixes the types state;
(e) rates are those realised, from an empty start.

It does not describe waiting: a load below 1 says that queues do not grow without end, not that they are short.

Source: the equilibrium and its bound in the underloaded case are those of Ao, Luo, Simchi-Levi, Wang
(arXiv 2504.11320); the linear program with overload, several pieces and prices is derived here.
"""

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
