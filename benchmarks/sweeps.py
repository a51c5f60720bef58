"""What a sweep costs beyond its cells: time of the main process, memory, and share of the work.

    python benchmarks/sweeps.py --out benchmarks/sweeps.json [--cells 10000] [--only memory costs share]

*memory*  peak resident memory of the main process for sweeps of 1 000 to 100 000 empty cells.
*costs*   processor time of the main process (and of a Dask scheduler) per batch and per cell, α·batches + β·cells, from
          sweeps of empty cells in batches of 1 and of 64, on two worker processes and on a Dask cluster of two workers;
          apart from it the time to write the table.
*share*   a sweep of real simulations on two worker processes: the share of the workers' time spent in cells, and the
          processor time of all processes over that of the cells, and over that of the engine alone;
        machinery_over_cells and machinery_over_loops, what the sweep adds as a share of its cells and of the compiled
        loops in them; loops_over_cells, how much of the cells these are.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import inspect
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


# ---- cells ----------------------------------------------------------------------------------------------------------


def empty_cell(parameters: dict[str, Any], seed: np.random.SeedSequence) -> dict[str, float]:
    """As much text as a simulation returns, for no work."""
    return {f"measure_{i}": i + parameters["x"] / 3.0 for i in range(90)}


_seconds = {
    f"{name}_{unit}": 0.0 for name in ("loops", "engine", "simulate") for unit in ("seconds", "cpu_s")
}


def _timed(name: str, function: Any) -> Any:
    def timed(*args: Any, **options: Any) -> Any:
        start, cpu = time.perf_counter(), time.process_time()
        try:
            return function(*args, **options)
        finally:
            _seconds[f"{name}_seconds"] += time.perf_counter() - start
            _seconds[f"{name}_cpu_s"] += time.process_time() - cpu

    with contextlib.suppress(ValueError, TypeError):  # compiled functions have none
        timed.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return timed


def timed_cell(parameters: dict[str, Any], seed: np.random.SeedSequence) -> Mapping[str, Any]:
    """The simulation cell, with the seconds it spends in the compiled loops, in the engine, in `simulate` and in all.

    Replications run one after another, since processor time is that of the process: the worker has one processor.
    """
    from fluidsched.simulation import kernel
    from fluidsched.sweeps import cells

    if not hasattr(cells.simulate, "__wrapped_for_benchmark__"):
        run_many = kernel.run_many

        def one_by_one(*args: Any, **options: Any) -> Any:
            return run_many(*args, **options, threads=1)

        kernel.run_many = _timed("engine", one_by_one)  # type: ignore[assignment]
        kernel._follow = _timed("loops", kernel._follow)
        cells.simulate = _timed("simulate", cells.simulate)
        cells.simulate.__wrapped_for_benchmark__ = True
    _seconds.update(dict.fromkeys(_seconds, 0.0))
    start, cpu = time.perf_counter(), time.process_time()
    row = cells.simulate_cell(parameters, seed)
    spent = {"cell_s": time.perf_counter() - start, "cell_cpu_s": time.process_time() - cpu}
    return {**row, **_seconds, **spent}


# ---- sweeps in processes of their own --------------------------------------------------------------------------------


def child(arguments: dict[str, Any]) -> dict[str, Any]:
    """Run this file again with a task; return what it prints."""
    environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed has its byte code
    command = [sys.executable, __file__, "--child", json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_child(task: dict[str, Any]) -> dict[str, Any]:
    from fluidsched.sweeps import running, sweep, sweeping

    write_result = sweeping.write_result
    table_cpu_s = 0.0

    def timed_write(*args: Any) -> Path:
        nonlocal table_cpu_s
        cpu = time.process_time()
        path = write_result(*args)
        table_cpu_s = time.process_time() - cpu
        return path

    sweeping.write_result = timed_write
    if task.get("batch"):
        running._Costs.batch_size = lambda self, workers, free: task["batch"]  # type: ignore[method-assign]
    executor: Any = None
    with contextlib.ExitStack() as stack:
        if task.get("dask"):
            from distributed import Client

            client = stack.enter_context(Client(task["dask"]))
            executor = client.get_executor(pure=False)
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        start, cpu = time.perf_counter(), time.process_time()
        result = sweep(task["spec"], directory, executor=executor, workers=task.get("workers"), format="csv")
        found: dict[str, Any] = {
            "wall_s": time.perf_counter() - start,
            "main_cpu_s": time.process_time() - cpu - table_cpu_s,
            "table_cpu_s": table_cpu_s,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "failed": result.failed,
        }
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        found["workers_cpu_s"] = children.ru_utime + children.ru_stime
        batches = (Path(directory) / "journal.txt").read_bytes().count(b" claim ")
        found["batches"] = batches
        if task.get("sums"):
            frame = result.to_frame()
            found |= {name: float(frame[name].sum()) for name in task["sums"]}
            found["diagnoses"] = sorted(frame.diagnosis.dropna().unique().tolist())[:3]
    return found


def empty(cells: int) -> dict[str, Any]:
    return {
        "grid": {"x": list(range(1000)), "y": list(range(cells // 1000))},
        "function": "sweeps:empty_cell",
    }


# ---- the three questions ---------------------------------------------------------------------------------------------


def memory() -> list[dict[str, Any]]:
    found = []
    for cells in (1_000, 10_000, 100_000):
        for workers in (None, 2):
            one = child({"spec": empty(cells), "workers": workers})
            found.append({"cells": cells, "workers": workers, **one})
            print(found[-1], file=sys.stderr)
    return found


@contextlib.contextmanager
def dask_cluster() -> Iterator[tuple[str, int]]:
    """Address and process of a scheduler with two workers."""
    from distributed import Client

    environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    with tempfile.TemporaryDirectory() as folder:
        common = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", f"{folder}/scheduler.json"]
        commands = [
            ["dask_scheduler", "--port", "0"],
            *[["dask_worker", "--nthreads", "1", "--no-nanny"]] * 2,
        ]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{name}", *common, *rest],
                env=environment,
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for name, *rest in commands
        ]
        try:
            while not os.path.exists(f"{folder}/scheduler.json"):
                time.sleep(0.1)
            with Client(scheduler_file=f"{folder}/scheduler.json") as client:
                client.wait_for_workers(2)
                address = client.scheduler.address
            yield address, processes[0].pid
        finally:
            for process in processes:
                process.kill()
                process.wait()


def cpu_s(pid: int) -> float:
    """Processor time of a living process, s."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def costs() -> dict[str, Any]:
    """Solve t = α·batches + β·cells from two sweeps, for the main process and the Dask scheduler."""
    found: dict[str, Any] = {}
    with dask_cluster() as (address, scheduler):
        for name, where in (("processes", {"workers": 2}), ("dask", {"dask": address, "workers": 2})):
            runs = []
            for cells, batch in ((2_000, 1), (20_000, 64)):
                before = cpu_s(scheduler)
                run = child({"spec": empty(cells), "batch": batch, **where})
                runs.append({"cells": cells, **run, "scheduler_cpu_s": cpu_s(scheduler) - before})
            matrix = [[run["batches"], run["cells"]] for run in runs]
            for measure in ("main_cpu_s", "scheduler_cpu_s")[: 1 + (name == "dask")]:
                per_batch, per_cell = np.linalg.solve(matrix, [run[measure] for run in runs])
                found[f"{name}_{measure}"] = {"per_batch_ms": 1e3 * per_batch, "per_cell_ms": 1e3 * per_cell}
            found[f"{name}_table"] = {"per_cell_ms": 1e3 * runs[1]["table_cpu_s"] / runs[1]["cells"]}
            found[f"{name}_runs"] = runs
            print(name, found, file=sys.stderr)
    return found


def share(cells: int) -> dict[str, Any]:
    spec = {
        "base": {
            "workload": "azure_conv",
            "server": {"gpu": "a100-80gb", "model": "llama-2-7b"},
            "horizon": 3600.0,
            "warmup": 150.0,
            "replications": 2,
        },
        "grid": {
            "seed": list(range(cells // 20)),
            "workload.load": [0.5, 0.6, 0.7, 0.8, 0.9],
            "policy": ["vllm", "sarathi", "capped", {"kind": "vllm", "watermark": 0.01}],
        },
        "function": "sweeps:timed_cell",
    }
    sums = ["engine_seconds", "simulate_seconds", "cell_s", "loops_cpu_s", "engine_cpu_s", "cell_cpu_s"]
    one = child({"spec": spec, "workers": 2, "sums": sums})
    cpu_s = one["main_cpu_s"] + one["table_cpu_s"] + one["workers_cpu_s"]
    return {
        "cells": cells,
        "busy_share_of_workers": one["cell_s"] / (2 * one["wall_s"]),
        "machinery_over_cells": cpu_s / one["cell_cpu_s"] - 1,
        "machinery_over_loops": (cpu_s - one["cell_cpu_s"]) / one["loops_cpu_s"],
        "loops_over_cells": one["loops_cpu_s"] / one["cell_cpu_s"],
        "engine_over_cells": one["engine_cpu_s"] / one["cell_cpu_s"],
        "cell_cpu_ms": 1e3 * one["cell_cpu_s"] / cells,
        **one,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--only", nargs="*", default=["memory", "costs", "share"])
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run_child(json.loads(arguments.child))))
        return
    names = ("numpy", "numba", "distributed")
    found: dict[str, Any] = {
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
    if "memory" in arguments.only:
        found["memory"] = memory()
    if "costs" in arguments.only:
        found["costs"] = costs()
    if "share" in arguments.only:
        found["share"] = share(arguments.cells)
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
