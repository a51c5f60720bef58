"""Nothing lost: processes killed at any moment, journals cut short, disks full, Ctrl-C, two sweeps at once.

The sweeps run in processes of their own (`sweep_driver.py`); what they finally write is compared with the
table of an undisturbed run, byte by byte.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sweep_driver import real_spec, the_spec
from sweep_processes import HERE, Start, dask_cluster

from fluidsched.errors import SimulationError
from fluidsched.sweeps import sweep

DRIVER = HERE / "sweep_driver.py"
CELLS = 200


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], bytes]:
    def table(seconds: float) -> bytes:
        directory = tmp_path_factory.mktemp("undisturbed")
        return sweep(the_spec(CELLS, seconds), directory, format="csv").path.read_bytes()

    tables = {seconds: table(seconds) for seconds in (0.002, 0.01)}
    return tables.__getitem__


def children(pid: int) -> list[int]:
    """Worker processes of a driver."""
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(word) for word in listed if b"spawn_main" in Path(f"/proc/{word}/cmdline").read_bytes()]
    except OSError:
        return []


def has_begun(pid: int, place: Path, with_workers: bool) -> bool:
    """Whether a driver has started its workers, or without any has opened the journal."""
    return bool(children(pid) if with_workers else list(place.glob(f"member-*-{pid}-*.lock")))


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def run_to_the_end(start: Start, directory: Path, *options: Any) -> None:
    process = start(DRIVER, directory, *options)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def records(directory: Path) -> Counter[bytes]:
    """How often each kind of record, and each cell's result, stands in the journal."""
    words = [line.split(b" ")[1:3] for line in (directory / "journal.txt").read_bytes().splitlines()]
    return Counter([kind for kind, _ in words] + [cell for kind, cell in words if kind == b"done"])


def torment(start: Start, directory: Path, expected: bytes, kills: int, seed: int) -> Counter[str]:
    """Run sweeps, kill main or worker processes, and shorten journals, until there were `kills` kills."""
    random = np.random.default_rng(seed)
    accidents: Counter[str] = Counter()
    sweeps = 0

    def killed() -> int:
        return accidents["worker killed"] + accidents["main killed"]

    while killed() < kills:
        place = directory / f"sweep-{sweeps}"
        sweeps += 1
        place.mkdir()
        workers = [] if random.random() < 0.3 else ["--workers", "2"]
        while not (place / "cells.csv").exists() and killed() < kills:
            process = start(DRIVER, place, "--seconds", 0.01, *workers)
            if random.random() < 0.8:  # how long a start takes depends on the machine
                while process.poll() is None and not has_begun(process.pid, place, bool(workers)):
                    time.sleep(0.005)
            limit = time.monotonic() + random.uniform(0.1, 1.0)
            while time.monotonic() < limit and process.poll() is None:
                time.sleep(0.005)
            what = random.choice(["main", "worker", "main and journal"])
            victims = children(process.pid)
            if what == "worker" and victims:
                kill(int(random.choice(victims)))
                accidents["worker killed"] += 1
                process.communicate(timeout=60)
                assert process.returncode == 0, "it goes on with new workers"
                continue
            if process.poll() is not None:
                continue
            kill(process.pid)
            process.communicate()
            accidents["main killed"] += 1
            journal = place / "journal.txt"
            if what == "main and journal" and journal.exists():
                os.truncate(journal, max(0, journal.stat().st_size - int(random.integers(1, 3000))))
                accidents["journal cut"] += 1
        run_to_the_end(start, place, "--seconds", 0.01, *workers)
        assert (place / "cells.csv").read_bytes() == expected
        assert not list(place.glob("member-*")), "nobody is left"
    return accidents


def test_a_few_random_kills(start: Start, tmp_path: Path, undisturbed: Callable[[float], bytes]) -> None:
    torment(start, tmp_path, undisturbed(0.01), kills=6, seed=1)


@pytest.mark.slow
def test_sixty_random_kills(start: Start, tmp_path: Path, undisturbed: Callable[[float], bytes]) -> None:
    accidents = torment(start, tmp_path, undisturbed(0.01), kills=60, seed=2)
    assert set(accidents) == {"worker killed", "main killed", "journal cut"}
    assert min(accidents.values()) >= 2  # of about 12 worker kills and 16 cuts expected


@pytest.mark.slow
def test_real_simulations_killed_again_and_again(start: Start, tmp_path: Path) -> None:
    """Compiled loops in worker processes; the main process is killed whenever it has done some more cells."""
    expected = sweep(real_spec(), tmp_path / "undisturbed", format="csv").path.read_bytes()
    place = tmp_path / "killed"
    random = np.random.default_rng(4)
    for kept in (5, 30, 60, 90):
        process = start(DRIVER, place, "--real", "--workers", 2)
        deadline = time.monotonic() + 120
        while not (place / "journal.txt").exists() or records(place)[b"done"] < kept:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        victims = [process.pid, *children(process.pid)]
        kill(int(random.choice(victims)))
        kill(process.pid)
        process.communicate()
    run_to_the_end(start, place, "--real", "--workers", 2)
    assert (place / "cells.csv").read_bytes() == expected


def test_workers_end_when_the_main_process_is_killed(start: Start, tmp_path: Path) -> None:
    process = start(DRIVER, tmp_path, "--seconds", 0.05, "--workers", 2)
    deadline = time.monotonic() + 30
    while len(workers := children(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(workers) == 2
    time.sleep(0.3)
    kill(process.pid)
    process.communicate()
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_a_full_disk_is_an_error_and_the_sweep_goes_on_when_there_is_room(
    start: Start, tmp_path: Path, undisturbed: Callable[[float], bytes]
) -> None:
    """The journal may grow by some records at a time only, at last the table does not fit."""
    kept = 0
    for most_bytes in (300, 3000, 4321, 9000, 12_000):
        process = start(DRIVER, tmp_path, "--seconds", 0.002, "--most-bytes", most_bytes)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "SimulationError cannot write" in errors
        assert "File too large" in errors
        journal = (tmp_path / "journal.txt").read_bytes()
        assert len(journal) <= most_bytes
        assert journal == b"" or journal.endswith(b"\n"), "nothing half-written is left"
        assert journal.count(b" done ") >= kept, "what was kept stays"
        kept = journal.count(b" done ")
    assert kept > 0
    run_to_the_end(start, tmp_path, "--seconds", 0.002)
    assert (tmp_path / "cells.csv").read_bytes() == undisturbed(0.002)


def test_a_table_that_does_not_fit_on_the_disk_leaves_the_journal_and_no_half_table(
    start: Start, tmp_path: Path, undisturbed: Callable[[float], bytes]
) -> None:
    run_to_the_end(start, tmp_path, "--seconds", 0.002)
    (tmp_path / "cells.csv").unlink()
    process = start(DRIVER, tmp_path, "--seconds", 0.002, "--most-bytes", 100)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "File too large. What is finished is kept" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal.txt", "manifest.json"]
    run_to_the_end(start, tmp_path, "--seconds", 0.002)
    assert (tmp_path / "cells.csv").read_bytes() == undisturbed(0.002)


@pytest.mark.parametrize("workers", [[], ["--workers", 2]])
def test_interrupting_leaves_the_journal_whole_and_no_process(
    start: Start, tmp_path: Path, undisturbed: Callable[[float], bytes], workers: list[Any]
) -> None:
    """Ctrl-C reaches the whole process group, workers included."""
    process = start(DRIVER, tmp_path, "--seconds", 0.01, *workers, start_new_session=True)
    deadline = time.monotonic() + 30
    while (
        b" done " not in (tmp_path / "journal.txt").read_bytes()
        if (tmp_path / "journal.txt").exists()
        else True
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    victims = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert (tmp_path / "journal.txt").read_bytes().endswith(b"\n")
    assert not list(tmp_path.glob("member-*"))
    assert not any(Path(f"/proc/{pid}").exists() for pid in victims)
    run_to_the_end(start, tmp_path, "--seconds", 0.01, *workers)
    assert (tmp_path / "cells.csv").read_bytes() == undisturbed(0.01)


def test_two_processes_share_the_cells_and_neither_does_any_twice(
    start: Start, tmp_path: Path, undisturbed: Callable[[float], bytes]
) -> None:
    both = [start(DRIVER, tmp_path, "--seconds", 0.01, "--join") for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert (tmp_path / "cells.csv").read_bytes() == undisturbed(0.01)
    counts = records(tmp_path)
    assert counts[b"done"] == CELLS
    assert len({key for key in counts if key.isdigit()}) == CELLS
    claimants = {line.split(b" ")[3] for line in (tmp_path / "journal.txt").read_bytes().splitlines()
                 if b" claim " in line}  # fmt: skip
    assert len(claimants) == 2


def test_cells_of_a_killed_process_go_to_the_one_that_joined_it(
    start: Start, tmp_path: Path, undisturbed: Callable[[float], bytes]
) -> None:
    first = start(DRIVER, tmp_path, "--seconds", 0.01, "--join", "--workers", 1)
    second = start(DRIVER, tmp_path, "--seconds", 0.01, "--join")
    deadline = time.monotonic() + 30
    while not (tmp_path / "journal.txt").exists() or records(tmp_path)[b"done"] < 40:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill(first.pid)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert (tmp_path / "cells.csv").read_bytes() == undisturbed(0.01)


def test_a_second_sweep_in_the_directory_is_refused(start: Start, tmp_path: Path) -> None:
    start(DRIVER, tmp_path, "--seconds", 0.05)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("member-*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second = start(DRIVER, tmp_path, "--seconds", 0.05)
    _, errors = second.communicate(timeout=30)
    assert second.returncode == 1
    assert "InputError" in errors
    assert "join it" in errors


def test_a_killed_dask_worker_costs_nothing(tmp_path: Path, undisturbed: Callable[[float], bytes]) -> None:
    """A worker of a cluster dies in the middle of its cells; the scheduler gives them to the other one."""
    pytest.importorskip("distributed", reason="needs the extra dask")
    from distributed import Client

    with dask_cluster(tmp_path) as (address, processes), Client(address) as client:

        def kill_one(stage: str, done: int, total: int) -> None:
            if done >= CELLS // 4:
                processes[-1].kill()

        directory = tmp_path / "out"
        executor = client.get_executor(pure=False)
        spec = the_spec(CELLS, 0.01)
        result = sweep(spec, directory, executor=executor, workers=2, format="csv", progress=kill_one)
        assert processes[-1].poll() is not None
        assert result.path.read_bytes() == undisturbed(0.01)


def test_a_lost_dask_scheduler_is_an_error_that_keeps_what_was_done(
    tmp_path: Path, undisturbed: Callable[[float], bytes]
) -> None:
    pytest.importorskip("distributed", reason="needs the extra dask")
    from distributed import Client

    spec, directory = the_spec(CELLS, 0.01), tmp_path / "out"
    with dask_cluster(tmp_path) as (address, processes), Client(address) as client:

        def kill_scheduler(stage: str, done: int, total: int) -> None:
            if done >= CELLS // 4:
                processes[0].kill()

        executor = client.get_executor(pure=False)
        with pytest.raises(SimulationError, match=r"broke down .* of 200 cells are kept; run the same sweep"):
            sweep(spec, directory, executor=executor, workers=2, format="csv", progress=kill_scheduler)
    assert sweep(spec, directory, format="csv").path.read_bytes() == undisturbed(0.01)
