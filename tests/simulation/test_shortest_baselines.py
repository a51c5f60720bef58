"""Baselines that order by length or count per class: by hand, in closed form, against hindsight, with wrong lengths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from simulation_cases import path_of, run_checked, server_of

import fluidsched as fs
from fluidsched.cli.inputs import load_table
from fluidsched.errors import InputError
from fluidsched.policy import baselines
from fluidsched.workload import ArrivalPath


def _believing(path: ArrivalPath, upper: list[int], lower: list[int] | None = None) -> ArrivalPath:
    return replace(
        path,
        predicted_output_tokens=np.array(upper),
        predicted_output_minimum=None if lower is None else np.array(lower),
    )


class TestByHand:
    """One second an iteration; A (1 prompt, 5 out), B (1, 2), C (1, 3), all at time 0, memory 7."""

    path = path_of((0.0, 1, 5), (0.0, 1, 2), (0.0, 1, 3))

    def _run(self, table: Any, path: ArrivalPath | None = None, capacity: float = 7) -> Any:
        return run_checked(self.path if path is None else path, server_of(capacity), table)[0]

    def test_mc_sf(self) -> None:
        """The three hold 3, then 6, then 3 + 3 (B has left): memory 7 takes them all. With memory 5, B and C enter,
        and A would make 6 in the second iteration. One later it makes 1 + 2 + 2 = 5, and then 2 + 3 with C."""
        assert_array_equal(self._run(baselines.mc_sf()).admitted_s, [0.0, 0.0, 0.0])
        run = self._run(baselines.mc_sf(), capacity=5)
        assert_array_equal(run.admitted_s, [1.0, 0.0, 0.0])
        assert_array_equal(run.finish_s, [6.0, 2.0, 3.0])

    def test_a_max(self) -> None:
        """Believed 5 long all three; B, C and A tie and go by index: A and then nobody (5 + 5 > 7) until A's end,
        except that a newcomer s behind needs 5 + (5 − s) ≤ 7 and then 5 itself: s = 3."""
        run = self._run(baselines.a_max(), _believing(self.path, [5, 5, 5]))
        assert_array_equal(run.admitted_s, [0.0, 3.0, 5.0])
        assert run.preempted == 0

    def test_a_min(self) -> None:
        """Believed 1 long: all enter at once (nothing is held ahead) and hold 3, 6, then 3 + 3 after B's end: fits.

        With memory 5, C gives way at t = 1 (2 + 2 + 2). It is back at t = 2 beside A's 3, as both are taken to leave
        next, gives way to A's 4 at t = 3, and enters for good when A has left at t = 5: it then lacks one token of
        three, or all of them if it restarts."""
        low = _believing(self.path, [9, 9, 9], [1, 1, 1])
        assert self._run(baselines.a_min(), low).preempted == 0
        run = self._run(baselines.a_min(), low, capacity=5)
        assert_array_equal(run.preemptions, [0, 0, 2])
        assert_array_equal(run.finish_s, [5.0, 2.0, 6.0])
        again = self._run(baselines.a_min(preemption="restart"), low, capacity=5)
        assert_array_equal(again.finish_s, [5.0, 2.0, 8.0])

    def test_class_budget(self) -> None:
        """One of "a" and two of "b" per iteration, whoever waits."""
        path = path_of(*[(0.0, 1, 4, "a")] * 3, *[(0.0, 1, 4, "b")] * 3)
        run, _ = run_checked(path, server_of(100), baselines.class_budget({"a": 1, "b": 2}))
        assert_array_equal(run.admitted_s, [0.0, 1.0, 2.0, 0.0, 0.0, 1.0])
        with pytest.raises(InputError, match="budgets"):
            baselines.class_budget({})


def test_equal_lengths_at_once_go_in_full_batches() -> None:
    """B fit at their peak exactly, so batches follow each other: total latency o Σ ⌈i/B⌉, i = 1..N."""
    batch, count, prompt, output = 3, 11, 4, 6
    path = path_of(*[(0.0, prompt, output)] * count)
    run, _ = run_checked(path, server_of(batch * (prompt + output - 1)), baselines.mc_sf())
    assert float((run.finish_s - path.arrival_s).sum()) == output * sum(
        -(-i // batch) for i in range(1, count + 1)
    )


def test_mc_sf_is_between_hindsight_and_its_gap() -> None:
    """12 tiny instances: no less than the proven optimum, and within the gap that the optimum certifies."""
    rng = np.random.default_rng(7)
    gaps = []
    for _ in range(12):
        count = int(rng.integers(3, 8))
        arrival = np.sort(rng.integers(0, 4, count)).astype(float)
        path = path_of(*[(a, int(rng.integers(1, 4)), int(rng.integers(1, 6))) for a in arrival.tolist()])
        server = server_of(int(rng.integers(9, 16)))
        best = fs.bounds.hindsight_optimum(path, server)
        run, _ = run_checked(path, server, baselines.mc_sf())
        total = float((run.finish_s - path.arrival_s).sum())
        assert best.is_optimal
        assert total >= best.lower - 1e-9
        gaps.append(best.gap_of(total))
        assert total == pytest.approx(best.lower * (1.0 + gaps[-1]))
    assert max(gaps) < 0.5


@pytest.mark.parametrize("name", ["exact", "lognormal", "interval", "bucketed"])
def test_predictions_of_every_kind_are_followed(name: str) -> None:
    """True lengths or upper ends that hold: nobody is preempted. Errors that may be too short: everybody finishes."""
    rng = np.random.default_rng(3)
    made = fs.predictions
    prediction = {
        "exact": made.exact(),
        "lognormal": made.lognormal(0.8),
        "interval": made.interval(2),
        "bucketed": made.bucketed([10, 20, 40]),
    }[name]
    arrays = np.cumsum(rng.exponential(1.0, 120)), rng.integers(1, 20, 120), rng.integers(1, 40, 120)
    path = ArrivalPath.from_arrays(*arrays).with_predictions(prediction, seed=1)
    for table in (baselines.mc_sf(predicted=True), baselines.a_max()):
        run, _ = run_checked(path, server_of(150), table)
        assert run.verdict == "finished"
        if name == "lognormal":
            assert run.preempted > 0
        else:
            assert run.preempted == 0
    if path.predicted_output_minimum is not None:
        run, _ = run_checked(path, server_of(150), baselines.a_min())
        assert run.verdict == "finished"


def test_names_on_the_command_line() -> None:
    """Those without arguments are known by name; a near miss is told."""
    for name in ("vllm", "sarathi", "vllm_v0", "mc_sf", "a_max", "a_min"):
        assert load_table(name) == getattr(baselines, name)()
    with pytest.raises(InputError, match="mc_sf"):
        load_table("mcsf")
