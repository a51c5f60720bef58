r"""The state of the installation: versions, threads, the kernel's cache, and answers that are known beforehand.

Self-checks compare with closed forms, not with stored output:

- *fluid program*: a request of l prompt and o output tokens holds W = o (l + (o − 1)/2) KV tokens, summed over its
  iterations. On T = d0 + d1·(KV tokens), with the memory C full, an iteration takes d0 + d1 C and completes C/W of such
  requests, so the server carries C / (W (d0 + d1 C)) a second.
- *kernel*: the compiled loop agrees with the reference simulator request by request, on a path that preempts.
- *queue*: with a threshold of 1 the embedded queue is that of M/D/1, W' = (W + A − 1)^+ with A Poisson(m), of mean
  m²/(2 (1 − m)).
- *table*: a compiled table comes back from JSON equal.
- *pictures*: Matplotlib draws a PNG.
"""

from __future__ import annotations

import importlib
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from fluidsched import __version__
from fluidsched._files import to_jsonable

__all__ = ["Check", "Diagnosis", "diagnose", "show_versions", "versions"]

SCHEMA = "fluidsched.doctor/1"

DEPENDENCIES = ("numpy", "scipy", "highspy", "cvxpy", "matplotlib", "numba", "pandas", "typer", "rich")
OPTIONAL = ("pyarrow", "distributed", "vllm")

Status = Literal["ok", "remark", "failed"]


def versions() -> dict[str, str]:
    """Name → version of fluidsched, Python, the platform and what is imported; optional packages if installed."""
    found = {
        "fluidsched": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for name in (*DEPENDENCIES, *OPTIONAL):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name in DEPENDENCIES:
                found[name] = "(not installed)"
    return found


def show_versions() -> str:
    """Versions of fluidsched, Python, the platform and the dependencies, one a line.

    Returns
    -------
    str
        To print or to paste into a bug report; `fluidsched doctor` prints it with checks of the installation.

    Examples
    --------
    >>> import fluidsched as fs
    >>> fs.show_versions().startswith("fluidsched")
    True
    """
    return "\n".join(f"{name} {version}" for name, version in versions().items())


@dataclass(frozen=True)
class Check:
    """One check of the installation.

    Attributes
    ----------
    name : str
    status : {"ok", "remark", "failed"}
        A remark is worth knowing and no failure.
    detail : str
        What was found, and the way out where something is wrong.
    seconds : float
        How long it took.
    """

    name: str
    status: Status
    detail: str
    seconds: float


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What `diagnose` found.

    Attributes
    ----------
    versions : dict of str to str
    checks : tuple of Check
    """

    versions: dict[str, str]
    checks: tuple[Check, ...]

    @property
    def is_well(self) -> bool:
        """Whether no check failed."""
        return all(check.status != "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        plain: dict[str, Any] = to_jsonable(self)
        return {"schema": SCHEMA, "is_well": self.is_well, **plain}

    def __repr__(self) -> str:
        width = max(len(name) for name in self.versions)
        lines = [f"{name:<{width}}  {version}" for name, version in self.versions.items()]
        lines.append("")
        for check in self.checks:
            lines.append(f"{check.status:<6}  {check.name:<14} {check.detail} ({check.seconds:.1f} s)")
        lines += [
            "",
            "All is well." if self.is_well else "Something is wrong: see the lines that say failed.",
        ]
        return "\n".join(lines)


def diagnose() -> Diagnosis:
    """Examine the installation: versions, threads, the kernel's cache, and self-checks against known answers.

    Takes some seconds; longer the first time, when the simulator is compiled. Nothing is written but numba's cache.

    Returns
    -------
    Diagnosis
    """
    examinations: tuple[tuple[str, Callable[[], tuple[Status, str]]], ...] = (
        ("dependencies", _dependencies),
        ("threads", _threads),
        ("cache", _cache),
        ("fluid program", _fluid_program),
        ("kernel", _kernel),
        ("queue", _queue),
        ("table", _table),
        ("pictures", _pictures),
    )
    return Diagnosis(versions(), tuple(_check(name, examine) for name, examine in examinations))


def _check(name: str, examine: Callable[[], tuple[Status, str]]) -> Check:
    """Run one examination; whatever it raises is its failure, and the others go on."""
    start = time.perf_counter()
    try:
        status, detail = examine()
    except Exception as error:  # a broken installation can raise anything
        status, detail = "failed", f"{type(error).__name__}: {error}"
    return Check(name, status, detail, time.perf_counter() - start)


def _dependencies() -> tuple[Status, str]:
    for name in DEPENDENCIES:
        importlib.import_module(name)
    return "ok", f"all {len(DEPENDENCIES)} load"


def _threads() -> tuple[Status, str]:
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return "ok", f"simulations use {usable} of {cores} cores"


def _cache() -> tuple[Status, str]:
    """Run the compiled loop once and say whether it came from numba's cache."""
    from numba import config

    from fluidsched.simulation import compiled

    if getattr(config, "DISABLE_JIT", 0):  # set from the environment, unknown to type checkers
        return (
            "remark",
            "NUMBA_DISABLE_JIT is set: the simulator runs as plain Python, a thousand times slower",
        )
    loop: Any = compiled.continuous
    _small_runs()
    folder = loop.stats.cache_path
    if folder is None:
        return (
            "remark",
            "no folder can be written: the simulator is compiled in every process. Set NUMBA_CACHE_DIR.",
        )
    if not os.access(folder, os.W_OK):
        return (
            "remark",
            f"{folder} cannot be written: what is not in it is compiled anew. Set NUMBA_CACHE_DIR.",
        )
    if sum(loop.stats.cache_hits.values()):
        return "ok", f"warm, in {folder}"
    return "ok", f"was cold, compiled now into {folder}; from now on it is warm"


def _small_runs() -> Any:
    """Two policies on a path that outgrows a small memory."""
    from fluidsched.policy import baselines
    from fluidsched.server import IterationTime, Server
    from fluidsched.simulation import simulate
    from fluidsched.workload import RequestType, Workload

    workload = Workload([RequestType("chat", 20.0, prompt_tokens=20, output_tokens=30)])
    server = Server(400, IterationTime.paper(d0=0.01, d1=1e-6))
    return simulate(workload, server, baselines.vllm(), horizon=20.0, replications=1, seed=3, check=True)


def _fluid_program() -> tuple[Status, str]:
    from fluidsched.fluid import solve_fluid
    from fluidsched.server import IterationTime, Server
    from fluidsched.workload import RequestType, Workload

    prompt, output, capacity, d0, d1 = 512, 21, 137_000, 0.01, 3.3e-7
    solution = solve_fluid(
        Workload([RequestType("chat", 1e3, prompt_tokens=prompt, output_tokens=output)]),
        Server(capacity, IterationTime.paper(d0=d0, d1=d1)),
    )
    work = output * (prompt + (output - 1) / 2)
    expected = capacity / (work * (d0 + d1 * capacity))
    found = float(solution.admitted_rate.sum())
    return _agree("carries", found, expected, "req/s")


def _kernel() -> tuple[Status, str]:
    runs = _small_runs()  # raises where kernel and reference differ, or a law is broken
    preempted = int(runs.measures("vllm")["preemptions"].sum())
    if not preempted:
        return "failed", "the small run was to preempt requests, and did not"
    count = len(runs.paths[0])
    return "ok", f"equals the reference on {count} requests, {preempted} preemptions among them"


def _queue() -> tuple[Status, str]:
    from fluidsched.queues import embedded_queue_mean

    mean = 0.7
    found = float(embedded_queue_mean(1, mean))
    return _agree("mean queue", found, mean**2 / (2 * (1 - mean)), "requests")


def _table() -> tuple[Status, str]:
    import json

    from fluidsched.fluid import solve_fluid
    from fluidsched.policy import PolicyTable, compile_policy
    from fluidsched.server import catalog
    from fluidsched.workload import workloads

    server = catalog.server("a100-80gb", "llama-2-7b")
    table = compile_policy(solve_fluid(workloads.azure_conv().at_load(0.8, server), server), "capped")
    if PolicyTable.from_dict(json.loads(table.to_json())) != table:
        return "failed", "a compiled table came back from JSON changed"
    return "ok", f"compiled, {table.max_in_service} in service at most, and back from JSON equal"


def _pictures() -> tuple[Status, str]:
    import io

    from matplotlib.figure import Figure

    stream = io.BytesIO()
    figure = Figure(figsize=(1.0, 1.0))
    figure.subplots().plot([0, 1], [0, 1])
    figure.savefig(stream, format="png")
    if not stream.getvalue().startswith(b"\x89PNG"):
        return "failed", "Matplotlib drew no PNG"
    return "ok", "drawn"


def _agree(what: str, found: float, expected: float, unit: str) -> tuple[Status, str]:
    close = abs(found - expected) <= 1e-8 * max(abs(expected), 1.0)
    status: Status = "ok" if close else "failed"
    return status, f"{what} {found:.6g} {unit}, known answer {expected:.6g}"
