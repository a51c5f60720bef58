"""Many replications in little memory: measured all alike, kept or not."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.simulation import run as run_module
from fluidsched.workload.path import DrawnPaths

WORKLOAD = fs.Workload(
    [
        fs.RequestType("chat", 3.0, fs.lengths.uniform(20, 90), fs.lengths.geometric(mean=12, maximum=60)),
        fs.RequestType("code", 1.0, prompt_tokens=150, output_tokens=8),
    ]
)
SERVER = fs.Server(2_000, fs.IterationTime.affine(0.02, 1e-4, 1e-3, 1e-6))
TABLES = [fs.baselines.vllm(), fs.baselines.sarathi()]


def simulated(**options: Any) -> fs.SimulationResult:
    return fs.simulate(WORKLOAD, SERVER, TABLES, **{"horizon": 15.0, "replications": 9, "seed": 5, **options})


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """9 replications are then 4, 4 and 1 at a time."""
    monkeypatch.setattr(run_module, "usable_threads", lambda: 2)
    monkeypatch.setattr(run_module, "BATCH", 2)


@pytest.mark.parametrize(
    ("kept", "options"), [(0, {"warmup": "mser5"}), (2, {"slo": {"ttft": 0.1}}), (6, {"check": True})]
)
def test_what_is_not_kept_is_measured_all_the_same(kept: int, options: dict[str, Any]) -> None:
    everything, some = simulated(**options), simulated(kept_replications=kept, **options)
    assert some.to_dict() == everything.to_dict()
    assert len(some.paths) == kept
    for r in range(kept):
        for name in some.policies:
            assert_array_equal(some.run(name, r).finish_s, everything.run(name, r).finish_s)


def test_at_no_time_are_there_more_paths_than_two_batches() -> None:
    """The next four are drawn while the last are still there."""
    alive: weakref.WeakSet[fs.ArrivalPath] = weakref.WeakSet()
    most = 0

    def draw(r: int) -> fs.ArrivalPath:
        nonlocal most
        path = WORKLOAD.sample(5.0, r)
        alive.add(path)
        most = max(most, len(alive))
        return path

    runs = fs.simulate(DrawnPaths(40, draw), SERVER, TABLES, horizon=5.0, kept_replications=0)
    assert runs.replications == 40
    assert most <= 2 * 4 + 1  # and the one that is looked at for its horizon


def test_every_run_is_shown_once_in_order() -> None:
    seen: list[tuple[str, int, int]] = []
    runs = simulated(
        kept_replications=1, on_run=lambda name, r, path, run: seen.append((name, r, run.count("finished")))
    )
    for name in runs.policies:
        assert [r for policy, r, _ in seen if policy == name] == list(range(9))
    assert seen[0][2] == runs.run("vllm").count("finished")


def test_progress_counts_every_run_once() -> None:
    counts: list[tuple[int, int]] = []
    simulated(kept_replications=0, progress=lambda stage, done, total: counts.append((done, total)))
    assert counts == [(done + 1, 18) for done in range(18)]


def test_what_looks_at_every_request_says_what_was_kept() -> None:
    some = simulated(kept_replications=2)
    with pytest.raises(InputError, match=r"one of the first 2.*kept_replications"):
        some.requests("vllm", 2)
    for look in (some.by_type, lambda: some.with_slo({"ttft": 1.0})):
        with pytest.raises(InputError, match=r"records of 2 of 9 replications"):
            look()
    with pytest.raises(InputError, match="no replication was kept"):
        simulated(kept_replications=0).requests("vllm")
    with pytest.raises(InputError, match="kept_replications"):
        simulated(kept_replications=1, records=False)


def test_memory_is_estimated_for_paths_drawn_elsewhere_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 replications of some 400 requests fit into a megabyte and a half when none is kept; else they do not."""
    paths = [WORKLOAD.sample(100.0, seed) for seed in range(20)]
    monkeypatch.setattr(run_module, "available_memory", lambda: 1.5 * 2.0**20)
    with pytest.raises(InputError, match=r"fit into memory.*kept_replications"):
        fs.simulate(paths, SERVER, TABLES[0], horizon=100.0)
    runs = fs.simulate(paths, SERVER, TABLES[0], horizon=100.0, kept_replications=0)
    assert np.isfinite(runs.measures("vllm")["mean_ttft"]).all()
