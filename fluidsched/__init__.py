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
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it, in pipeline order. A public namespace (lengths, ...) is its own module.
_PUBLIC = {
    "RequestType": "fluidsched.workload",
    "Workload": "fluidsched.workload",
    "ArrivalPath": "fluidsched.workload",
    "lengths": "fluidsched.workload.lengths",
    "arrivals": "fluidsched.workload.arrivals",
    "read_trace": "fluidsched.workload",
    "workloads": "fluidsched.workload.workloads",
    "Server": "fluidsched.server",
    "IterationTime": "fluidsched.server",
    "catalog": "fluidsched.server.catalog",
    "solve_fluid": "fluidsched.fluid",
    "FluidSolution": "fluidsched.fluid",
    "FluidProgram": "fluidsched.fluid",
    "compile_policy": "fluidsched.policy",
    "PolicyTable": "fluidsched.policy",
    "baselines": "fluidsched.policy.baselines",
    "simulate": "fluidsched.simulation",
    "SimulationResult": "fluidsched.simulation",
    "bounds": "fluidsched.bounds",
    "compare": "fluidsched.comparison",
    "Comparison": "fluidsched.comparison",
    "sweep": "fluidsched.sweeps",
    "plan": "fluidsched.planning",
    "plots": "fluidsched.plots",
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
