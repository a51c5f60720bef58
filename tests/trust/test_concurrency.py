"""Several threads, processes and event loops at once: the same numbers, nothing printed, nothing lost.

What concerns the whole process (standard output while HiGHS says hello, HiGHS's threads, numba's cache, levels of
loggers) is tried in processes of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import fluidsched as fs
from fluidsched.cli import app
from fluidsched.cli.outputs import progress_bar
from fluidsched.fluid._highs import new_highs
from fluidsched.simulation import code_cache

ROOT = Path(__file__).resolve().parents[2]
SERVER = fs.Server(20_000, fs.IterationTime.affine(0.01, 1e-5, 1e-5, 3e-7, 3e-9), max_batch_size=64)


def answers(scale: float) -> list[float]:
    """Numbers of the whole chain, on the kernel, for a workload of this rate."""
    types = [
        fs.RequestType("a", 2.0 * scale, 300, fs.lengths.geometric(60, maximum=300)),
        fs.RequestType("b", scale, 90, 20),
    ]
    fluid = fs.solve_fluid(fs.Workload(types), SERVER)
    found = [fluid.objective_value, *fluid.admitted_rate, *fluid.load]
    tables = [fs.compile_policy(fluid, kind) for kind in ("capped", "wait")]
    found += [row.threshold or 0 for table in tables for row in table.types] + [tables[0].max_in_service or 0]
    runs = fs.simulate(
        fluid.model.workload, SERVER, tables, horizon=40.0, replications=3, seed=5, engine="kernel"
    )
    return [float(value) for value in [*found, *(runs.measures(t.name)["mean_e2e"].mean() for t in tables)]]


SCALES = (0.5, 1.0, 2.0)
SCRIPT = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from test_concurrency import SCALES, answers
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


# ---------------------------------------------------------------------------------------------- threads


def test_threads_get_the_answers_of_one_after_the_other() -> None:
    """Solving, compiling tables and simulating in eight threads at once changes no digit."""
    alone = [answers(scale) for scale in SCALES]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answers, SCALES * 4)) == alone * 4


def test_a_program_shared_by_threads_is_solved_right_in_each() -> None:
    """One `FluidProgram` keeps a solver and a basis; solved from many threads it gives what a fresh one gives."""
    types = [fs.RequestType(f"t{i}", 1.0, 300 - 40 * i, 10 + 30 * i) for i in range(6)]
    workload, rng = fs.Workload(types), np.random.default_rng(1)
    rates = [rng.exponential(20.0, 6) for _ in range(60)]
    expected = [fs.FluidProgram(workload, SERVER).solve(rate).admitted_rate for rate in rates]
    program = fs.FluidProgram(workload, SERVER)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns in the middle of a solve
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda rate: program.solve(rate).admitted_rate, rates * 8))
    finally:
        sys.setswitchinterval(interval)
    np.testing.assert_allclose(found, expected * 8, rtol=1e-9)


def test_the_first_solve_in_many_threads_leaves_standard_output_where_it_was() -> None:
    """HiGHS's banner is kept away by lending standard output away; two that lend at once used to lose it."""
    code = (
        "import time\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from fluidsched.fluid import _highs\n"
        "construct = _highs._construct\n"
        "def slowly():\n"
        "    time.sleep(0.05)\n"
        "    return construct()\n"
        "_highs._construct = slowly\n"
        "with ThreadPoolExecutor(8) as pool: list(pool.map(lambda _: _highs.new_highs(), range(8)))\n"
        "print('still here')\n"
    )
    done = python(code)
    assert (done.stdout, done.returncode) == ("still here\n", 0), done.stderr


# ------------------------------------------------------------------------------------------ event loops


def test_the_chain_runs_inside_an_event_loop() -> None:
    """As in a notebook: in the loop's own thread and in its executor at the same time."""

    async def cell() -> list[list[float]]:
        loop = asyncio.get_running_loop()
        beside = [loop.run_in_executor(None, answers, scale) for scale in SCALES]
        here = answers(SCALES[0])
        return [here, *await asyncio.gather(*beside)]

    alone = [answers(scale) for scale in SCALES]
    assert asyncio.run(cell()) == [alone[0], *alone]


def test_a_progress_bar_is_drawn_inside_an_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, stages in turn, from a thread; on standard error only. Without a terminal nothing is drawn."""
    terminal = Console(file=open(os.devnull, "w"), force_terminal=True, width=80, record=True)  # noqa: SIM115
    monkeypatch.setattr("rich.console.Console", lambda **_: terminal)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)

    async def cell() -> None:
        with progress_bar(quiet=False) as report:
            assert report is not None
            runs = asyncio.get_running_loop().run_in_executor
            for stage in ("solve", "simulate a", "simulate b"):
                await runs(None, report, stage, 1, 2)

    asyncio.run(cell())
    assert "solve" in terminal.export_text()
    terminal.file.close()
    with progress_bar(quiet=True) as report:
        assert report is None


# -------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_give_the_answers_of_their_parent(method: str) -> None:
    """Children forked after a solve and a run in threads, and spawned ones, compute the same."""
    code = SCRIPT + (
        "if __name__ == '__main__':\n"
        "    import json, multiprocessing, warnings\n"
        "    warnings.simplefilter('ignore', DeprecationWarning)  # of Python 3.12: fork beside threads\n"
        "    here = [answers(scale) for scale in SCALES]\n"
        f"    with multiprocessing.get_context({method!r}).Pool(2) as pool:\n"
        "        there = pool.map(answers, SCALES, chunksize=1)\n"
        "    print(json.dumps([here, there]))\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    here, there = json.loads(done.stdout)
    assert here == there == [answers(scale) for scale in SCALES]


SMALL_RUN = """
import fluidsched as fs, sys
path = fs.ArrivalPath.from_arrays([0.0, 0.5], [4, 2], [2, 1])
server = fs.Server(10, fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0))
run = fs.simulate(path, server, fs.baselines.vllm(), engine="kernel").run("vllm")
from fluidsched.simulation import compiled
print(run.finish_s.tolist(), sum(compiled.continuous.stats.cache_hits.values()))
"""


@pytest.mark.slow
def test_processes_that_compile_at_the_same_time_share_one_cache(tmp_path: Path) -> None:
    """Both compile into an empty folder and are right; whoever comes after them finds the code there."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SMALL_RUN]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in both] == ["[2.0, 2.0] 0\n"] * 2
    after = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert after.stdout == "[2.0, 2.0] 1\n"
    [code] = tmp_path.rglob("*.nbc")
    code.write_bytes(code.read_bytes()[:1000])
    mended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert mended.stdout == "[2.0, 2.0] 0\n"
    assert "holds damaged code" in mended.stderr
    assert (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        == after.stdout
    )


NOWHERE = """
import tempfile
def refuse(*args, **kwargs): raise PermissionError(13, "Permission denied")
tempfile.TemporaryFile = refuse  # how numba asks whether a folder can be written
"""


def test_where_no_folder_can_be_written_the_kernel_loads_and_says_so() -> None:
    """As with a read-only home and installation: once, with the way out; numba by itself ends the import."""
    code = NOWHERE + (
        "from fluidsched.simulation import compiled\n"
        "from fluidsched.reporting import installation\n"
        "installation._small_runs = lambda: None\n"
        "print(*installation._cache())\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no folder for compiled code can be written") == 1
    assert "Set NUMBA_CACHE_DIR" in done.stderr
    assert done.stdout.startswith("remark no folder can be written")


@pytest.mark.slow
def test_where_no_folder_can_be_written_runs_are_right() -> None:
    """Compiled in the process, not kept."""
    done = python(NOWHERE + SMALL_RUN)
    assert (done.stdout, done.returncode) == ("[2.0, 2.0] 0\n", 0), done.stderr


def twice(x: int) -> int:
    """Something quick to compile."""
    return 2 * x


def test_code_that_cannot_be_kept_or_read_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that is full, and a file cut off: the function is compiled, its answer right."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        pytest.skip("nothing is compiled")
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    assert code_cache.cached(twice, {"_nrt": False})(3) == 6  # type: ignore[arg-type]
    [code] = tmp_path.rglob("*.nbc")
    code.write_bytes(b"no code")
    assert code_cache.cached(twice, {"_nrt": False})(3) == 6
    assert "holds damaged code" in caplog.text
    caplog.clear()
    full = code_cache.cached(twice, {"_nrt": False})
    monkeypatch.setattr(full._cache, "_save_overload", _full)
    monkeypatch.setattr(full._cache, "_load_overload", lambda *_: None)
    assert full(3) == 6
    assert "No space left on device" in caplog.text


def _full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


# ------------------------------------------------------------------------------- what the process shares


def test_options_of_one_solve_are_not_those_of_the_next() -> None:
    """Each object of HiGHS has its own: a MIP, an interior-point solve and a ranging leave the simplex as it was."""
    names = ("solver", "presolve", "time_limit", "mip_rel_gap", "threads", "run_crossover", "output_flag")
    before = [new_highs().getOptionValue(name)[1] for name in names]
    new_highs(solver="ipm", run_crossover="off", presolve="choose", time_limit=1.0, mip_rel_gap=0.5)
    fluid = fs.solve_fluid(fs.Workload([fs.RequestType("a", 1.0, 10, 10)]), SERVER)
    fs.fluid.ranging(fluid)
    assert [new_highs().getOptionValue(name)[1] for name in names] == before


def test_every_solve_bears_with_threads_that_others_started() -> None:
    """HiGHS's threads are the process's: programs of pools, ranging and hindsight run with those that are there."""
    code = (
        "import highspy\n"
        "h = highspy.Highs()\n"
        "h.setOptionValue('output_flag', False)\n"
        "h.setOptionValue('threads', 2)\n"
        "h.addVar(0, 1)\n"
        "h.run()\n"
        "import fluidsched as fs\n"
        "w = fs.Workload([fs.RequestType('a', 1.0, 10, 10)])\n"
        "s = fs.Server(1000, fs.IterationTime.paper(0.01, 1e-6))\n"
        "fs.fluid.ranging(fs.solve_fluid(w, s))\n"
        "fs.fluid.solve_pools(w, [fs.Pool(s)])\n"
        "path = fs.ArrivalPath.from_arrays([0.0] * 6, [3, 5] * 3, [4, 2] * 3)\n"
        "server = fs.Server(12, fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0))\n"
        "assert fs.bounds.hindsight_bound(path, server).lower > 0\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_quiet_holds_for_its_command_only(tmp_path: Path) -> None:
    """--quiet used to leave the root logger of the process at ERROR."""
    root = logging.getLogger()
    seen = []
    with contextlib.ExitStack() as stack:
        stack.callback(root.setLevel, root.level)
        root.setLevel(logging.INFO)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fluidsched.server.catalog.entries", lambda: seen.append(root.level) or [])
            CliRunner().invoke(app, ["catalog", "--quiet"])
        assert seen[:1] == [logging.ERROR]
        assert root.level == logging.INFO
