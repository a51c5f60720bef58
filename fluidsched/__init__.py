"""Admission and scheduling of LLM requests by fluid linear programs.

The pipeline, one way, each step returning a frozen object:

    Workload + Server -> FluidSolution -> PolicyTable -> SimulationResult -> Comparison

Public names load when first used, so `import fluidsched` stays fast.

Examples
--------
>>> import fluidsched as fs
>>> workload = fs.Workload([fs.RequestType("chat", arrival_rate=12.0, prompt_tokens=512, output_tokens=21)])
>>> server = fs.Server(kv_capacity=137_000, iteration_time=fs.IterationTime.paper(d0=0.01, d1=3.3e-7))
>>> fs.solve_fluid(workload, server).is_stable
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if (
    TYPE_CHECKING
):  # what readers of the code and type checkers see; at run time `__getattr__` loads each on first use
    from fluidsched import bounds as bounds
    from fluidsched import errors as errors
    from fluidsched import examples as examples
    from fluidsched import fluid as fluid
    from fluidsched import plots as plots
    from fluidsched.comparison import Comparison as Comparison
    from fluidsched.comparison import compare as compare
    from fluidsched.fleets import verify_capacity as verify_capacity
    from fluidsched.fluid import FluidProgram as FluidProgram
    from fluidsched.fluid import FluidSolution as FluidSolution
    from fluidsched.fluid import plan_capacity as plan_capacity
    from fluidsched.fluid import solve_fair as solve_fair
    from fluidsched.fluid import solve_fluid as solve_fluid
    from fluidsched.fluid import solve_transient as solve_transient
    from fluidsched.fluid import stability_region as stability_region
    from fluidsched.measured import compare_measured as compare_measured
    from fluidsched.planning import plan as plan
    from fluidsched.policy import PolicyTable as PolicyTable
    from fluidsched.policy import adapt as adapt
    from fluidsched.policy import baselines as baselines
    from fluidsched.policy import compile_policy as compile_policy
    from fluidsched.reporting import report as report
    from fluidsched.reporting import show_versions as show_versions
    from fluidsched.server import IterationTime as IterationTime
    from fluidsched.server import Pool as Pool
    from fluidsched.server import Server as Server
    from fluidsched.server import calibrate as calibrate
    from fluidsched.server import catalog as catalog
    from fluidsched.simulation import SimulationResult as SimulationResult
    from fluidsched.simulation import fluid_trajectory as fluid_trajectory
    from fluidsched.simulation import routers as routers
    from fluidsched.simulation import simulate as simulate
    from fluidsched.simulation.closed import simulate_closed as simulate_closed
    from fluidsched.simulation.cluster import simulate_cluster as simulate_cluster
    from fluidsched.sweeps import sweep as sweep
    from fluidsched.tuning import tune as tune
    from fluidsched.workload import ArrivalPath as ArrivalPath
    from fluidsched.workload import RequestType as RequestType
    from fluidsched.workload import UserSequences as UserSequences
    from fluidsched.workload import Workload as Workload
    from fluidsched.workload import arrivals as arrivals
    from fluidsched.workload import lengths as lengths
    from fluidsched.workload import patience as patience
    from fluidsched.workload import predictions as predictions
    from fluidsched.workload import read_trace as read_trace
    from fluidsched.workload import workloads as workloads

__version__ = "0.1.0"

# Public name -> module that defines it, in pipeline order. A public namespace (lengths, ...) is its own module.
_PUBLIC = {
    "RequestType": "fluidsched.workload",
    "Workload": "fluidsched.workload",
    "ArrivalPath": "fluidsched.workload",
    "UserSequences": "fluidsched.workload",
    "lengths": "fluidsched.workload.lengths",
    "arrivals": "fluidsched.workload.arrivals",
    "predictions": "fluidsched.workload.predictions",
    "patience": "fluidsched.workload.patience",
    "read_trace": "fluidsched.workload",
    "workloads": "fluidsched.workload.workloads",
    "Server": "fluidsched.server",
    "IterationTime": "fluidsched.server",
    "catalog": "fluidsched.server.catalog",
    "calibrate": "fluidsched.server",
    "fluid": "fluidsched.fluid",
    "solve_fluid": "fluidsched.fluid",
    "FluidSolution": "fluidsched.fluid",
    "FluidProgram": "fluidsched.fluid",
    "solve_transient": "fluidsched.fluid",
    "Pool": "fluidsched.server",
    "solve_fair": "fluidsched.fluid",
    "stability_region": "fluidsched.fluid",
    "plan_capacity": "fluidsched.fluid",
    "compile_policy": "fluidsched.policy",
    "PolicyTable": "fluidsched.policy",
    "adapt": "fluidsched.policy",
    "baselines": "fluidsched.policy.baselines",
    "simulate": "fluidsched.simulation",
    "SimulationResult": "fluidsched.simulation",
    "simulate_cluster": "fluidsched.simulation.cluster",
    "simulate_closed": "fluidsched.simulation.closed",
    "routers": "fluidsched.simulation.routers",
    "fluid_trajectory": "fluidsched.simulation",
    "bounds": "fluidsched.bounds",
    "compare": "fluidsched.comparison",
    "Comparison": "fluidsched.comparison",
    "compare_measured": "fluidsched.measured",
    "sweep": "fluidsched.sweeps",
    "tune": "fluidsched.tuning",
    "verify_capacity": "fluidsched.fleets",
    "plan": "fluidsched.planning",
    "plots": "fluidsched.plots",
    "report": "fluidsched.reporting",
    "examples": "fluidsched.examples",
    "show_versions": "fluidsched.reporting",
}

__all__ = [*_PUBLIC, "__version__", "errors"]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("fluidsched.errors")
    try:
        module_name = _PUBLIC[name]
    except KeyError:
        raise AttributeError(f"module 'fluidsched' has no attribute {name!r}") from None
    module = importlib.import_module(module_name)
    value = module if module_name.rpartition(".")[2] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
