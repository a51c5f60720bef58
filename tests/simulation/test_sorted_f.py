"""The baseline Sorted-F: its batches against all subsets, its runs by hand and beside shortest first."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation_cases import path_of, server_of

import fluidsched as fs
from fluidsched.errors import InputError, SimulationError
from fluidsched.simulation.reference import run_reference
from fluidsched.simulation.sorted_f import _best_batch, _line, sorted_f

LENGTHS = st.dictionaries(
    st.integers(0, 20), st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6
)


def _peak(batch: list[tuple[int, int]]) -> int:
    """KV of a batch started together, iteration by iteration."""
    longest = max(output for _, output in batch)
    return max(sum(prompt + t - 1 for prompt, output in batch if output >= t) for t in range(1, longest + 1))


@given(lengths=LENGTHS, capacity=st.integers(24, 60))
def test_batches_are_those_of_least_f(lengths: dict[int, tuple[int, int]], capacity: int) -> None:
    """Witness: all subsets, their memory counted token by token; greedy batches fit and are never better."""
    feasible = [
        subset
        for size in range(1, len(lengths) + 1)
        for subset in combinations(lengths, size)
        if _peak([lengths[i] for i in subset]) <= capacity
    ]

    def quality(subset: tuple[int, ...]) -> tuple[float, int]:
        return sum(lengths[i][1] for i in subset) / len(subset) ** 2, -len(subset)

    best = min(quality(subset) for subset in feasible)
    assert quality(tuple(_best_batch(lengths, capacity, exact=8))) == best
    greedy = tuple(_best_batch(lengths, capacity, exact=0))
    assert _peak([lengths[i] for i in greedy]) <= capacity
    assert quality(greedy)[0] >= best[0]
    assert sorted(_line(lengths, capacity, 8)) == sorted(lengths)


@given(outputs=st.lists(st.integers(1, 12), min_size=1, max_size=7), capacity=st.integers(15, 40))
def test_with_equal_prompts_greedy_batches_are_best(outputs: list[int], capacity: int) -> None:
    """Of batches of one size the shortest outputs are lightest, so a prefix by output attains the minimum."""
    lengths = {i: (3, output) for i, output in enumerate(outputs)}
    values = []
    for exact in (0, 8):
        batch = _best_batch(lengths, capacity, exact)
        values.append(sum(lengths[i][1] for i in batch) / len(batch) ** 2)
    assert values[0] == values[1]


def test_the_line_is_made_anew_when_somebody_arrives() -> None:
    """C = 10, one at a time: of B (6, 5) and C (6, 4) C is next; D (6, 1), who arrives meanwhile, overtakes B."""
    path = path_of((0.0, 6, 2), (0.0, 6, 5), (0.0, 6, 4), (3.0, 6, 1))
    run = run_reference(path, server_of(10), sorted_f(10), horizon=None)
    np.testing.assert_array_equal(run.admitted_s, [0.0, 7.0, 2.0, 6.0])


def test_prompts_that_differ_favour_it_over_shortest_first() -> None:
    """A backlog of short answers to long prompts and longer answers to short ones: on the same path, less latency;
    and known lengths never preempt. A second run with the same rule is the first again."""
    rng = np.random.default_rng(2)
    count = 60
    long = rng.random(count) < 0.5
    path = fs.ArrivalPath.from_arrays(
        np.zeros(count), np.where(long, 80, 2), np.where(long, rng.integers(1, 5, count), 8)
    )
    rule = sorted_f(100)
    runs = [run_reference(path, server_of(100), rule, horizon=None) for _ in range(2)]
    np.testing.assert_array_equal(runs[0].finish_s, runs[1].finish_s)
    shortest = run_reference(path, server_of(100), fs.baselines.mc_sf(), horizon=None)
    assert runs[0].preempted == 0
    assert runs[0].finish_s.sum() < 0.8 * shortest.finish_s.sum()


def test_a_wrong_capacity_is_refused() -> None:
    with pytest.raises(InputError, match="kv_capacity"):
        sorted_f(0)
    with pytest.raises(SimulationError, match="request 0 needs 9"):
        run_reference(path_of((0.0, 6, 4)), server_of(10), sorted_f(8), horizon=None)
