"""Types from a path: conservation, partition, merging."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.workload.binning import grid, quantile_ranges

MOMENTS = [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (2, 0), (2, 1), (0, 3)]


def random_path(seed: int, size: int = 300) -> fs.ArrivalPath:
    """A path with many ties and a long tail."""
    rng = np.random.default_rng(seed)
    return fs.ArrivalPath.from_arrays(
        np.sort(rng.uniform(0, 60, size)),
        np.ceil(rng.lognormal(4, 1.5, size)),
        np.where(rng.random(size) < 0.4, 8, np.ceil(rng.exponential(30, size))),
    )


def assert_conserved(workload: fs.Workload, path: fs.ArrivalPath, rtol: float = 1e-12) -> None:
    """Σ_j λ_j E_j[p^i o^j] is the path's rate times its mean, from exact integer sums."""
    p, o = path.prompt_tokens.astype(object), path.output_tokens.astype(object)
    for i, j in MOMENTS:
        exact = int((p**i * o**j).sum()) / path.duration
        assert float(workload.arrival_rate @ workload.moment(i, j)) == pytest.approx(exact, rel=rtol)
    work = int((o * p + o * (o - 1) // 2).sum()) / path.duration
    assert float(workload.arrival_rate @ workload.kv_work) == pytest.approx(work, rel=rtol)


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, 4, 6, 7, 12]))
def test_rate_and_moments_of_the_path_are_conserved(seed: int, types: int) -> None:
    """Whatever the number of types, and after every merge."""
    path = random_path(seed)
    workload = path.to_workload(types=types)
    assert len(workload) == types
    assert np.all(workload.arrival_rate > 0)
    assert_conserved(workload, path)
    for fewer in workload.merge_sizes:
        assert len(workload.merged(fewer)) == fewer
        assert_conserved(workload.merged(fewer), path)


@given(st.integers(0, 10**6), st.sampled_from([1, 4, 6, 12]))
def test_every_request_matches_exactly_one_type(seed: int, types: int) -> None:
    """The boxes partition [1, ∞) × [1, ∞): checked around every corner, for every merge."""
    workload = random_path(seed).to_workload(types=types)
    for members in (workload.merged(fewer).types for fewer in workload.merge_sizes):
        ends = {1, 2**31 - 1}
        for member in members:
            for bounds in (member.prompt_range, member.output_range):
                assert bounds is not None
                ends |= {end + d for end in bounds if end for d in (-1, 0, 1) if end + d >= 1}
        for p, o in product(sorted(ends), repeat=2):
            inside = [
                m
                for m in members
                if m.prompt_range[0] <= p <= (m.prompt_range[1] or p)
                and m.output_range[0] <= o <= (m.output_range[1] or o)
            ]
            assert len(inside) == 1


@given(st.integers(0, 10**6))
def test_labels_agree_with_rates(seed: int) -> None:
    """The path's own requests count rate × duration in each type; sampled ones stay in their type."""
    path = random_path(seed)
    workload = path.to_workload(types=6)
    labelled = path.labelled(workload)
    counts = np.bincount(labelled.type, minlength=6)
    np.testing.assert_allclose(counts / path.duration, workload.arrival_rate, rtol=1e-14)
    sampled = workload.sample(20.0, seed)
    np.testing.assert_array_equal(
        workload.classify(sampled.prompt_tokens, sampled.output_tokens), sampled.type
    )


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 8))
def test_quantile_ranges_are_never_empty(values: list[int], groups: int) -> None:
    """Each range holds a value; None exactly when there are too few distinct ones."""
    array = np.array(values)
    ranges = quantile_ranges(array, groups)
    assert (ranges is None) == (len(set(values)) < groups)
    assume(ranges is not None)
    assert ranges[0][0] == 1
    assert ranges[-1][1] is None
    for (_, end), (start, _) in pairwise(ranges):
        assert start == end + 1
    assert all(any(lo <= v and (hi is None or v <= hi) for v in values) for lo, hi in ranges)


def test_quantile_ranges_of_distinct_values_have_equal_counts() -> None:
    """Without ties every range has its share."""
    assert quantile_ranges(np.arange(10, 22), 4) == [(1, 12), (13, 15), (16, 18), (19, None)]


def test_grid_is_as_square_as_possible() -> None:
    """a·b = k with a ≤ b, by trial."""
    for k in range(1, 200):
        a, b = grid(k)
        assert a * b == k
        assert a <= b
        assert not any(k % d == 0 and d <= k // d for d in range(a + 1, k))


def test_merging_joins_neighbouring_bins() -> None:
    """12 = 3 × 4 types merge to 6 = 3 × 2, to the 3 ranges of prompts, and to one."""
    workload = random_path(5).to_workload(types=12)
    assert workload.merge_sizes == (1, 3, 6, 12)
    assert workload.merged(12) == workload
    three = workload.merged(3)
    assert all(t.output_range == (1, None) for t in three.types)
    assert three.type_names == tuple(
        f"p{n}/o1+" for n in dict.fromkeys(t.split("/")[0][1:] for t in workload.type_names)
    )
    np.testing.assert_allclose(three.arrival_rate, workload.arrival_rate.reshape(3, 4).sum(axis=1))
    assert workload.merged(1).type_names == ("all",)
    assert workload.merged(3).merged(1) == workload.merged(3).merged(1)
    with pytest.raises(InputError, match="be one of 1, 3, 6, 12"):
        workload.merged(5)


def test_types_known_by_label_merge_into_one() -> None:
    """Without ranges only "all" can be recognised; rates and laws mix."""
    workload = fs.Workload([fs.RequestType("a", 1.0, 10, 5), fs.RequestType("b", 3.0, 100, 9)])
    assert workload.merge_sizes == (1, 2)
    merged = workload.merged(1)
    assert merged.total_arrival_rate == 4.0
    assert merged.kv_work[0] == pytest.approx((workload.arrival_rate @ workload.kv_work) / 4)
    assert merged.types[0].prompt_range == merged.types[0].output_range == (1, None)
    with pytest.raises(InputError, match="label"):
        workload.classify([10], [5])


def test_merging_types_of_different_priority_is_refused() -> None:
    """A merged type has one priority."""
    workload = fs.Workload([fs.RequestType("a", 1.0, 10, 5, priority=1), fs.RequestType("b", 3.0, 100, 9)])
    with pytest.raises(InputError, match="priority"):
        workload.merged(1)


def test_types_without_arrivals_merge() -> None:
    """At rate zero the laws are mixed evenly, so nothing is divided by zero."""
    merged = random_path(1).to_workload(types=4).scaled(0.0).merged(1)
    assert merged.total_arrival_rate == 0.0
    assert merged.kv_work[0] > 0


@pytest.mark.parametrize(
    ("path", "types", "message"),
    [
        (fs.ArrivalPath.from_arrays([0, 0], [1, 2], [3, 4]), 1, "different times"),
        (fs.ArrivalPath.from_arrays([1], [1], [3]), 1, "at least two requests"),
        (fs.ArrivalPath.from_arrays([0, 1, 2], [5, 5, 6], [3, 4, 3]), 12, "Ask for fewer types"),
        (fs.ArrivalPath.from_arrays([0, 1, 2], [5, 5, 6], [3, 4, 3]), 4, "Ask for fewer types"),
        (random_path(1), 0, "types must be a whole number of at least 1"),
    ],
)
def test_impossible_bins_are_refused(path: fs.ArrivalPath, types: int, message: str) -> None:
    """No duration, or fewer distinct lengths than bins."""
    with pytest.raises(InputError, match=message):
        path.to_workload(types=types)


def test_a_sampled_path_has_its_horizon_as_duration() -> None:
    """Rates of a binned sample are counts over the horizon."""
    path = fs.Workload([fs.RequestType("a", 5.0, fs.lengths.uniform(1, 50), 7)]).sample(100.0, seed=1)
    assert path.to_workload(types=1).total_arrival_rate == len(path) / 100.0


@pytest.mark.data
@pytest.mark.parametrize("name", ["AzureLLMInferenceTrace_conv.csv", "AzureLLMInferenceTrace_code.csv"])
def test_real_traces_are_conserved(data_root: Path, name: str) -> None:
    """The Azure hours in 12 types, and merged, keep rate and moments; bins are about equally full."""
    path = fs.read_trace(data_root / "traces" / name)
    workload = path.to_workload(types=12)
    shares = workload.arrival_rate / workload.total_arrival_rate
    assert 0.5 / 12 < shares.min() < shares.max() < 1.5 / 12
    for types in (12, 3, 1):
        assert_conserved(workload.merged(types), path)
