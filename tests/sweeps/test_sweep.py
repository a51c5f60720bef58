"""The sweep as a whole: one table whatever runs it, failures as rows, errors that say how to go on."""

from __future__ import annotations

import math
import multiprocessing
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sweep_driver import the_spec

from fluidsched._processors import processors, usable_threads
from fluidsched.errors import InputError, SimulationError
from fluidsched.sweeps import SweepSpec, sweep
from fluidsched.sweeps.running import MOST_BATCH, _Costs

SPEC = the_spec(cells=60, seconds=0.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The table as one process writes it."""
    return sweep(SPEC, tmp_path_factory.mktemp("undisturbed"), format="csv").path.read_bytes()


def test_table_has_a_row_per_cell_in_order_with_parameters_first(tmp_path: Path) -> None:
    result = sweep(SPEC, tmp_path, format="csv")
    frame = result.to_frame()
    assert list(frame.columns) == ["x", "y", "status", "diagnosis", "value", "count", "pid_free"]
    assert list(frame.index) == list(range(60))
    assert frame.y.tolist() == ["a", "b"] * 30
    assert (frame.status == "done").all()
    assert repr(result) == f"<SweepResult 'sweep': 60 cells, in {tmp_path / 'cells.csv'}>"
    assert "<table" in result._repr_html_()


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_write_the_same_bytes(tmp_path: Path, undisturbed: bytes, workers: int) -> None:
    assert sweep(SPEC, tmp_path, workers=workers, format="csv").path.read_bytes() == undisturbed


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_any_executor_writes_the_same_bytes(tmp_path: Path, undisturbed: bytes, method: str) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as executor:
        assert sweep(SPEC, tmp_path, executor=executor, format="csv").path.read_bytes() == undisturbed


class Backwards(Executor):
    """Finishes tasks in the opposite order of their submission, as far as it can tell."""

    def __init__(self) -> None:
        self.tasks: list[tuple[Future[Any], Any, Any]] = []
        self.pool = ThreadPoolExecutor(1)
        self.sizes: list[int] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.tasks.append((Future(), fn, args))
        self.sizes.append(len(args[-1]))
        future = self.tasks[-1][0]
        self.pool.submit(self.run_last)
        return future

    def run_last(self) -> None:
        time.sleep(0.005)
        future, fn, args = self.tasks.pop()
        future.set_result(fn(*args))


def test_order_of_completion_does_not_matter(tmp_path: Path, undisturbed: bytes) -> None:
    executor = Backwards()
    assert sweep(SPEC, tmp_path, executor=executor, workers=4, format="csv").path.read_bytes() == undisturbed
    with executor.pool:
        pass


@pytest.fixture
def dask_executor(dask_address: str) -> Iterator[Executor]:
    from distributed import Client

    with Client(dask_address) as client:
        yield client.get_executor(pure=False)


def test_dask_cluster_writes_the_same_bytes(
    tmp_path: Path, undisturbed: bytes, dask_executor: Executor
) -> None:
    """A real scheduler and two worker processes on loopback."""
    result = sweep(SPEC, tmp_path, executor=dask_executor, workers=2, format="csv")
    assert result.path.read_bytes() == undisturbed


def test_parquet_has_the_same_content_and_the_same_bytes_for_any_executor(
    tmp_path: Path, undisturbed: bytes
) -> None:
    pytest.importorskip("pyarrow", reason="needs the extra parquet")
    for name, workers in (("one", None), ("two", 2)):
        result = sweep(SPEC, tmp_path / name, workers=workers)
        assert result.path.name == "cells.parquet"
    assert (tmp_path / "one" / "cells.parquet").read_bytes() == result.path.read_bytes()
    csv = sweep(SPEC, tmp_path / "one", format="csv").to_frame()
    # what is missing is None in one and nan in the other, which pandas before 3 warns of
    one, other = (frame.astype(object).where(frame.notna(), None) for frame in (result.to_frame(), csv))
    pd.testing.assert_frame_equal(one, other, check_dtype=False)


def test_an_ended_sweep_computes_nothing_again(tmp_path: Path) -> None:
    first = sweep(SPEC, tmp_path, format="csv")
    size = (tmp_path / "journal.txt").stat().st_size
    calls: list[tuple[str, int, int]] = []
    assert sweep(SPEC, tmp_path, format="csv", progress=lambda *c: calls.append(c)).failed == first.failed
    assert (tmp_path / "journal.txt").stat().st_size == size
    assert calls == [("cells", 60, 60)]


def test_progress_counts_cells_up_to_the_last(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    sweep(SPEC, tmp_path, format="csv", progress=lambda *c: calls.append(c))
    assert calls[0] == ("cells", 0, 60)
    assert calls[-1] == ("cells", 60, 60)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


def test_failed_cells_are_rows_with_their_diagnosis_and_run_again_on_request(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    spec = SweepSpec(
        grid={"x": range(4)}, base={"broken": str(broken)}, function="sweep_cells:sometimes_failing"
    )
    result = sweep(spec, tmp_path / "out", format="csv")
    assert (result.cells, result.failed) == (4, 2)
    assert result.path.read_text() == (
        "cell,x,status,diagnosis,value\n0,0,done,,\n1,1,failed,ValueError: x = 1 is odd,\n"
        "2,2,done,,inf\n3,3,failed,ValueError: x = 3 is odd,\n"
    )
    broken.unlink()
    assert sweep(spec, tmp_path / "out", format="csv").failed == 2
    again = sweep(spec, tmp_path / "out", format="csv", retry_failed=True)
    assert again.failed == 0
    assert again.to_frame().value.tolist()[1:] == [math.inf] * 3


def test_a_mapping_that_a_cell_function_uses_again_is_read_when_it_is_returned(tmp_path: Path) -> None:
    """Records are written batch by batch."""
    spec = SweepSpec(grid={"x": range(300)}, function="sweep_cells:one_mapping")
    assert sweep(spec, tmp_path, format="csv").to_frame().value.tolist() == list(range(300))


def test_workers_share_the_processors_unless_the_environment_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads of cells side by side would only wait for each other."""
    spec = SweepSpec(grid={"x": range(2)}, function="sweep_cells:threads")
    monkeypatch.delenv("FLUIDSCHED_THREADS", raising=False)
    monkeypatch.setattr("fluidsched.sweeps.running.processors", lambda: 2 * processors())
    shared = sweep(spec, tmp_path / "shared", workers=2, format="csv").to_frame()
    assert shared.threads.tolist() == [processors()] * 2, "of twice as many processors two workers have half"
    monkeypatch.setenv("FLUIDSCHED_THREADS", "1")
    assert sweep(spec, tmp_path / "told", workers=1, format="csv").to_frame().threads.tolist() == [1, 1]
    for wrong in ("0", "many", ""):
        monkeypatch.setenv("FLUIDSCHED_THREADS", wrong)
        with pytest.raises(InputError, match="FLUIDSCHED_THREADS must be a whole number of at least 1"):
            usable_threads()


def test_a_cell_that_kills_its_worker_is_a_failed_row_and_the_others_are_not(tmp_path: Path) -> None:
    spec = SweepSpec(grid={"x": range(8)}, function="sweep_cells:deadly")
    frame = sweep(spec, tmp_path, workers=2, format="csv").to_frame()
    assert frame.status.tolist() == ["failed" if x == 3 else "done" for x in range(8)]
    assert frame.diagnosis[3] == "the worker process died each time it ran this cell, at last alone"


def test_a_broken_executor_of_the_caller_is_an_error_that_keeps_what_was_done(tmp_path: Path) -> None:
    spec = SweepSpec(grid={"x": range(8)}, function="sweep_cells:deadly")
    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor,
        pytest.raises(SimulationError, match=r"broke down .* [0-3] of 8 cells are kept; run the same"),
    ):
        sweep(spec, tmp_path, executor=executor, format="csv")
    executor = ProcessPoolExecutor(1)
    executor.shutdown()
    with pytest.raises(SimulationError, match="executor broke down"):
        sweep(spec, tmp_path, executor=executor, format="csv")


def test_a_script_without_main_guard_is_told_so(tmp_path: Path, start: Any) -> None:
    script = tmp_path / "script.py"
    spec = {"grid": {"x": list(range(50))}, "function": "sweep_cells:draw"}
    script.write_text(
        f"import fluidsched.sweeps as s\ns.sweep({spec}, {str(tmp_path / 'out')!r}, workers=1)\n"
    )
    process: subprocess.Popen[str] = start(script)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert 'needs `if __name__ == "__main__":` around what it does' in errors


@pytest.mark.parametrize("value", [[1.0], {"a": 1}, 1j])
def test_a_cell_may_return_numbers_and_strings_only(tmp_path: Path, value: object) -> None:
    from fluidsched.sweeps.running import _encode

    with pytest.raises(InputError, match="result 'v' of a cell must be a number, a string or None"):
        _encode({"v": value}, ())
    with pytest.raises(InputError, match="not be called like another column"):
        _encode({"x": 1}, ("cell", "x"))


def test_values_of_numpy_and_any_mapping_are_written_as_plain_ones() -> None:
    from fluidsched.sweeps.running import _encode

    plain = {"a": 0.1, "1": 2, "c": True, "d": None, "e": "ä"}
    given = {"a": np.float64(0.1), 1: np.int64(2), "c": np.True_, "d": None, "e": np.str_("ä")}
    for values in (plain, given, MappingProxyType(plain), MappingProxyType(given)):
        assert _encode(values, ("x",)) == '{"a": 0.1, "1": 2, "c": true, "d": null, "e": "ä"}'
    with pytest.raises(InputError, match="not be called like another column"):
        _encode(given, ("cell", "1"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"directory": "missing/deeper"},
            "directory must name a directory, or one that can be made; got .*deeper",
        ),
        ({"directory": "a file"}, "directory must name a directory.*a file .File exists"),
        ({"workers": 0}, "workers must be a whole number of at least 1"),
        ({"executor": 2}, "executor must be a concurrent.futures.Executor"),
        ({"format": "xlsx"}, 'format must be "auto", "parquet" or "csv"'),
        ({"spec": {"grid": {"x": [1]}, "what": 1}}, r"spec\.what must be left out"),
    ],
)
def test_wrong_arguments_are_refused_by_name(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    (tmp_path / "a file").touch()
    given = {"spec": SPEC, "directory": "out"} | arguments
    with pytest.raises(InputError, match=message):
        sweep(given.pop("spec"), tmp_path / given.pop("directory"), **given)


def test_a_changed_spec_library_or_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("one")
    with_file = {"base": {"workload.file": str(file)}, "grid": {"x": [1]}, "function": "sweep_cells:draw"}
    sweep(with_file, tmp_path / "with file", format="csv")
    file.write_text("two")
    with pytest.raises(InputError, match="differing in the contents of a file"):
        sweep(with_file, tmp_path / "with file")
    sweep(SPEC, tmp_path, format="csv")
    with pytest.raises(InputError, match=r"holds another sweep \(differing in base\)"):
        sweep(the_spec(cells=60, seconds=0.1), tmp_path)
    monkeypatch.setattr("fluidsched.__version__", "99")
    with pytest.raises(InputError, match=r"holds another sweep \(differing in version\)"):
        sweep(SPEC, tmp_path)


def test_batch_size_follows_from_costs() -> None:
    costs = _Costs()
    assert costs.batch_size(workers=2, free=10_000) == 1, "nothing is known yet"
    costs.add_batch(cells=10, seconds=0.1)
    assert costs.batch_size(workers=2, free=10_000) == 50, "cells of 10 ms, batches of 0.5 s"
    costs.add_main(batches=1, seconds=0.005)
    assert costs.batch_size(workers=100, free=10**7) == 200, "100 workers at 5 ms a batch: 2 s"
    assert costs.batch_size(workers=1000, free=10**7) == MOST_BATCH
    assert costs.batch_size(workers=2, free=40) == 10, "the end is shared out"
    assert costs.batch_size(workers=2, free=0) == 1
