"""What the fluid toolkit costs beside cvxpy and beside HiGHS itself, in one run.

    python benchmarks/fluid_speed.py --out benchmarks/fluid_speed.json [--full] [--smoke]

Four questions, all in processor time of this process, every answer checked:

- `resolve`: 1 000 re-solves of 20 types at changed rates through `FluidProgram`, against a problem
  rebuilt in cvxpy each time and against one compiled cvxpy problem whose rates are a parameter (DPP). The two of
  cvxpy run on the first 100 of the 1 000 rates; figures are per solve. cvxpy certifies nothing, so ours stands both
  without and with (`certified_`) the certificates.
- `closed_form`: `equilibrium` at 1e6 (rate, capacity) points.
- `assembly`: everything but HiGHS (model, assembly, certificate) in routing 10 000 types over 20 pools, as a share of
  HiGHS's own time. Unless `--full`, HiGHS is stopped at forty times what the assembly took until then (at ten
  times the share could not come out below its target): of a stopped solve the share is an upper bound for model and
  assembly, and leaves the certificate out.
- `growth`: time of `solve_fluid` against the number of types and of `solve_pools` against types and pools.

Targets: 50 and 5 times faster than cvxpy, 1 s, a tenth. The figure is written beside the JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import highspy
import numpy as np

import fluidsched as fs
from fluidsched.errors import SolverError
from fluidsched.fluid import solve_pools
from fluidsched.fluid.closed_forms import equilibrium

Row = dict[str, Any]

#: HiGHS is stopped after this many times the assembly's processor time, unless asked to finish.
STOP = 40.0


def workload_of(types: int, load: float, server: fs.Server) -> fs.Workload:
    """Types of random lengths at random rates that make this load."""
    rng = np.random.default_rng(types)
    members = [
        fs.RequestType(f"{j}", rng.uniform(0.1, 1), int(rng.integers(1, 2000)), int(rng.integers(1, 500)))
        for j in range(types)
    ]
    return fs.Workload(members).at_load(load, server)


def fleet_of(pools: int, types: int) -> list[fs.Pool]:
    """The first servers of the catalog with room for every type."""
    entries = [entry for entry in fs.catalog.entries() if entry.kv_capacity_tokens > 100_000]
    return [fs.Pool(entry.server(), max(types / 500, 0.2)) for entry in entries[:pools]]


def spent(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of `work`, and what it returned."""
    start = time.process_time()
    answer = work()
    return time.process_time() - start, answer


def cvxpy_problem(program: fs.FluidProgram, rate: Any) -> Any:
    """The same program in cvxpy, rows divided by their largest coefficient."""
    import cvxpy as cp

    model = program.model
    matrix = np.column_stack([model.matrix, model.rate_coefficient])
    size = np.abs(matrix).max(axis=1)
    x = cp.Variable(matrix.shape[1], nonneg=True)
    rows = (matrix / size[:, None]) @ x <= model.limit / size
    return cp.Problem(cp.Maximize(cp.sum(x[:-1])), [rows, x[:-1] <= rate])


def resolve(ours: int, theirs: int) -> Row:
    """Re-solves with every rate changed by up to a fifth."""
    import cvxpy as cp

    server = fs.catalog.server("a100-80gb", "llama-2-7b")
    workload = workload_of(20, 1.2, server)
    program, rng = fs.FluidProgram(workload, server), np.random.default_rng(1)
    rates = [workload.arrival_rate * rng.uniform(0.8, 1.2, len(workload)) for _ in range(ours)]
    program.solve()
    seconds, solutions = spent(lambda: [program.solve(rate) for rate in rates])
    certificate_s, certified = spent(lambda: [solution.certificate.ok for solution in solutions])
    values = [solution.objective_value for solution in solutions]
    parameter = cp.Parameter(len(workload), nonneg=True)
    compiled = cvxpy_problem(program, parameter)

    def again(rate: Any) -> float:
        parameter.value = rate
        return float(compiled.solve(solver=cp.HIGHS))

    again(workload.arrival_rate)  # compiles
    rebuilt_s, rebuilt = spent(
        lambda: [float(cvxpy_problem(program, rate).solve(solver=cp.HIGHS)) for rate in rates[:theirs]]
    )
    dpp_s, parametric = spent(lambda: [again(rate) for rate in rates[:theirs]])
    each, checked = seconds / ours, (seconds + certificate_s) / ours
    return {
        "types": 20,
        "solves": ours,
        "cvxpy_solves": theirs,
        "fluidsched_ms": 1e3 * each,
        "fluidsched_certified_ms": 1e3 * checked,
        "rebuilt_ms": 1e3 * rebuilt_s / theirs,
        "parameter_ms": 1e3 * dpp_s / theirs,
        "times_faster_than_rebuilt": rebuilt_s / theirs / each,
        "times_faster_than_parameter": dpp_s / theirs / each,
        "certified_times_faster_than_rebuilt": rebuilt_s / theirs / checked,
        "certified_times_faster_than_parameter": dpp_s / theirs / checked,
        "right": bool(
            all(certified)
            and np.allclose(rebuilt, values[:theirs], rtol=1e-7)
            and np.allclose(parametric, values[:theirs], rtol=1e-7)
        ),
    }


def closed_form(points: int) -> Row:
    """Equilibria under two time pieces."""
    rng = np.random.default_rng(2)
    rate, capacity = rng.uniform(1, 10, points), rng.uniform(1e4, 1e6, points)
    busy, kv_work = rate[:, None] * np.array([1e-3, 2e-3]), rate * 5e4
    seconds, answer = spent(lambda: equilibrium([0.01, -0.002], busy, kv_work, capacity))
    period = answer.iteration_time
    right = np.isfinite(period).all() and bool((period > 0.0).all())
    return {"points": points, "seconds": seconds, "right": bool(right)}


def assembly(types: int, pools: int, full: bool) -> Row:
    """All but HiGHS against HiGHS, which stops at `STOP` times the assembly unless `full`."""
    fleet = fleet_of(pools, types)
    workload = workload_of(types, 1.0, fleet[0].server)
    workload = workload.scaled(0.5 * types / 500 * pools)
    run, solver_s = highspy.Highs.run, 0.0
    start = 0.0

    def timed(highs: Any) -> Any:
        nonlocal solver_s
        before = time.process_time()
        if not full:
            highs.setOptionValue("time_limit", max(STOP * (before - start - solver_s) - solver_s, 0.1))
        status = run(highs)
        solver_s += time.process_time() - before
        return status

    def solve() -> str:
        try:
            return "optimal" if solve_pools(workload, fleet).certificate.ok else "wrong"
        except SolverError as error:
            if "Time limit" not in str(error):
                raise
            return "stopped"

    highspy.Highs.run = timed
    try:
        start = time.process_time()
        outcome = solve()
        ours = time.process_time() - start - solver_s
    finally:
        highspy.Highs.run = run
    return {
        "types": types,
        "pools": pools,
        "outcome": outcome,
        "assembly_s": ours,
        "highs_s": solver_s,
        "share": ours / solver_s,
        "right": outcome != "wrong",
    }


def growth(types: list[int], pooled_types: list[int], pools: list[int]) -> list[Row]:
    """Fastest of three processor times of one solve."""
    server = fs.catalog.server("a100-80gb", "llama-2-7b")
    rows = []
    for count in types:
        workload = workload_of(count, 1.5, server)
        tries = [spent(lambda w=workload: fs.solve_fluid(w, server).certificate.ok) for _ in range(3)]
        rows.append(
            {"types": count, "pools": 0, "seconds": min(tries)[0], "right": all(ok for _, ok in tries)}
        )
    for number in pools:
        for count in pooled_types:
            fleet, workload = fleet_of(number, count), workload_of(count, 1.2, server)
            tries = [spent(lambda w=workload, f=fleet: solve_pools(w, f).certificate.ok) for _ in range(3)]
            rows.append(
                {
                    "types": count,
                    "pools": number,
                    "seconds": min(tries)[0],
                    "right": all(ok for _, ok in tries),
                }
            )
    return rows


def measure(smoke: bool, full: bool) -> Row:
    """All four; the smoke pass is the same in small."""
    return {
        "fluidsched": fs.__version__,
        "versions": {name: version(name) for name in ("numpy", "highspy", "cvxpy")}
        | {"python": platform.python_version()},
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "resolve": resolve(20, 3) if smoke else resolve(1000, 100),
        "closed_form": closed_form(1000 if smoke else 1_000_000),
        "assembly": assembly(100, 3, full) if smoke else assembly(10_000, 20, full),
        "growth": growth([10], [10], [2])
        if smoke
        else growth([10, 30, 100, 300, 1000, 3000, 10_000], [10, 30, 100, 300], [1, 2, 4, 8]),
    }


def draw(found: Row, path: Path) -> None:
    """Cost against types, a line for each number of pools."""
    from matplotlib.figure import Figure

    from fluidsched import plots

    with plots.style():
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        for position, number in enumerate(sorted({row["pools"] for row in found["growth"]})):
            rows = [row for row in found["growth"] if row["pools"] == number]
            label = (
                "solve_fluid, one server"
                if number == 0
                else f"solve_pools, {number} pool" + "s" * (number > 1)
            )
            axes.plot(
                [row["types"] for row in rows],
                [1e3 * row["seconds"] for row in rows],
                marker=".",
                color=plots.COLOURS[position],
                linestyle=plots.LINES[position],
                label=label,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("request types")
        axes.set_ylabel("processor time of a solve (ms)")
        axes.legend()
        figure.savefig(path)


def main(arguments: list[str] | None = None) -> Row:
    """Measure, write, and say what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--full", action="store_true", help="let HiGHS finish")
    parser.add_argument("--smoke", action="store_true", help="the same in small")
    options = parser.parse_args(arguments)
    found = measure(options.smoke, options.full)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    draw(found, options.out.with_suffix(".png"))
    return found


if __name__ == "__main__":
    print(json.dumps(main(), indent=2))
