"""Poisson arrivals and sampled paths: statistics, and the laws that common random numbers rest on.

Statistical tests fix a seed; with a random one each would reject a correct sampler with probability 1e-6
(`ERROR_RATE`).
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.workload.model import _in_order

ERROR_RATE = 1e-6

seeds = st.integers(0, 2**32)


def mix(rates: dict[str, float]) -> fs.Workload:
    """A workload with a type of its own lengths per name."""
    types = [
        fs.RequestType(name, rate, fs.lengths.uniform(1, 10 + len(name)), fs.lengths.geometric(5, maximum=40))
        for name, rate in rates.items()
    ]
    return fs.Workload(types)


def of_type(path: fs.ArrivalPath, name: str) -> list[tuple[float, int, int]]:
    """The requests of one type."""
    rows = zip(path.arrival_s, path.prompt_tokens, path.output_tokens, strict=True)
    return [(float(t), int(p), int(o)) for i, (t, p, o) in enumerate(rows) if path.label(i) == name]


def test_gaps_are_exponential() -> None:
    """Kolmogorov–Smirnov test of 20 000 gaps."""
    times = fs.arrivals.poisson().sample(4.0, 5000.0, np.random.default_rng(2))
    gaps = np.diff(times, prepend=0.0)
    assert stats.kstest(gaps, "expon", args=(0, 1 / 4)).pvalue > ERROR_RATE


def test_counts_are_poisson_and_independent_from_window_to_window() -> None:
    """Index of dispersion of 5 000 windows is χ²; neighbouring counts are uncorrelated (normal, sd 1/√n)."""
    times = fs.arrivals.poisson().sample(3.0, 5000.0, np.random.default_rng(4))
    counts = np.bincount(times.astype(int), minlength=5000)
    dispersion = counts.var(ddof=0) * 5000 / counts.mean()
    assert ERROR_RATE / 2 < stats.chi2(4999).cdf(dispersion) < 1 - ERROR_RATE / 2
    correlation = np.corrcoef(counts[:-1], counts[1:])[0, 1]
    assert abs(correlation) < stats.norm.isf(ERROR_RATE / 2) / np.sqrt(4999)


def test_number_of_arrivals_is_poisson_also_when_few_are_expected() -> None:
    """4 000 draws with mean 0.7 against the Poisson law: Pearson's test."""
    rng = np.random.default_rng(6)
    counts = np.array([len(fs.arrivals.poisson().sample(0.7, 1.0, rng)) for _ in range(4000)])
    observed = np.bincount(np.minimum(counts, 4), minlength=5)
    law = stats.poisson(0.7)
    expected = 4000 * np.array([*law.pmf(range(4)), law.sf(3)])
    assert stats.chisquare(observed, expected).pvalue > ERROR_RATE


def test_sampled_path_is_sorted_typed_and_inside_its_horizon() -> None:
    """Times ascend within [0, horizon); every request has its type; the horizon is kept."""
    path = mix({"a": 3.0, "bb": 1.0}).sample(200.0, seed=1)
    assert np.all(np.diff(path.arrival_s) >= 0)
    assert 0 < path.arrival_s[0] <= path.arrival_s[-1] < 200
    assert path.type_names == ("a", "bb")
    assert (path.horizon, path.duration) == (200.0, 200.0)
    assert path.rate == len(path) / 200.0
    shares = np.bincount(path.type, minlength=2)
    assert stats.binomtest(int(shares[0]), len(path), 0.75).pvalue > ERROR_RATE


@given(seeds)
def test_same_seed_same_bytes(seed: int) -> None:
    """An integer seed, and a seed sequence used twice, give the same path; another seed gives another."""
    workload = mix({"a": 3.0, "bb": 1.0})
    sequence = np.random.SeedSequence(seed)
    first = workload.sample(20.0, seed)
    assert workload.sample(20.0, sequence).fingerprint == first.fingerprint
    assert workload.sample(20.0, sequence).fingerprint == first.fingerprint
    assert workload.sample(20.0, seed + 1).fingerprint != first.fingerprint
    spawned = [workload.sample(20.0, s).fingerprint for s in np.random.SeedSequence(seed).spawn(3)]
    assert len({first.fingerprint, *spawned}) == 4


def test_a_generator_is_advanced() -> None:
    """Two draws from one generator differ; equal generators give equal paths."""
    workload = mix({"a": 3.0})
    rng, twin = np.random.default_rng(1), np.random.default_rng(1)
    first, second = workload.sample(20.0, rng), workload.sample(20.0, rng)
    assert first.fingerprint != second.fingerprint
    assert workload.sample(20.0, twin).fingerprint == first.fingerprint


@given(seeds, st.integers(0, 2))
def test_a_type_without_arrivals_changes_nothing(seed: int, place: int) -> None:
    """Adding a type of rate 0 anywhere leaves all requests as they were."""
    rates = [("a", 2.0), ("bb", 1.0)]
    without = mix(dict(rates)).sample(30.0, seed)
    rates.insert(place, ("idle", 0.0))
    with_idle = mix(dict(rates)).sample(30.0, seed)
    for column in ("arrival_s", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(getattr(with_idle, column), getattr(without, column))
    labels = [[path.label(i) for i in range(len(path))] for path in (with_idle, without)]
    assert labels[0] == labels[1]


@given(seeds)
def test_a_type_keeps_its_requests_whatever_the_others_do(seed: int) -> None:
    """Order of types, rates of others and their presence do not touch a type's own requests."""
    full = of_type(mix({"a": 2.0, "bb": 1.0, "c": 0.5}).sample(30.0, seed), "bb")
    assert of_type(mix({"c": 9.0, "bb": 1.0, "a": 0.0}).sample(30.0, seed), "bb") == full
    assert of_type(mix({"bb": 1.0}).sample(30.0, seed), "bb") == full


@given(seeds)
def test_doubling_rates_halves_times(seed: int) -> None:
    """The scaled workload over half the horizon has the same path, twice as fast (exactly: factor 2)."""
    workload = mix({"a": 2.0, "bb": 1.0})
    slow, fast = workload.sample(32.0, seed), workload.scaled(2.0).sample(16.0, seed)
    np.testing.assert_array_equal(fast.arrival_s * 2, slow.arrival_s)
    np.testing.assert_array_equal(fast.output_tokens, slow.output_tokens)


@given(seeds)
def test_a_longer_horizon_only_adds_requests(seed: int) -> None:
    """The first requests of a longer path are the shorter path."""
    workload = mix({"a": 2.0, "bb": 1.0})
    short, long = workload.sample(10.0, seed), workload.sample(500.0, seed)
    for column in ("arrival_s", "prompt_tokens", "output_tokens", "type"):
        np.testing.assert_array_equal(getattr(long, column)[: len(short)], getattr(short, column))
    assert not len(long) > len(short) or long.arrival_s[len(short)] >= 10.0


def test_simultaneous_arrivals_are_ordered_by_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same instant: the type with the smaller index first."""
    monkeypatch.setattr(fs.arrivals.ArrivalProcess, "sample", lambda *_: np.array([1.0, 2.0, 2.0]))
    path = mix({"a": 1.0, "bb": 1.0}).sample(10.0, seed=1)
    assert path.arrival_s.tolist() == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    assert path.type is not None
    assert path.type.tolist() == [0, 1, 0, 0, 1, 1]


def test_no_arrivals_is_a_path_too() -> None:
    """All rates zero gives an empty path of rate 0."""
    path = mix({"a": 0.0}).sample(10.0, seed=1)
    assert (len(path), path.rate) == (0, 0.0)


@pytest.mark.parametrize(
    ("horizon", "seed", "message"),
    [
        (0.0, 1, "horizon must"),
        (float("nan"), 1, "horizon must"),
        (1e12, 1, "expected requests"),
        (10.0, -1, "seed must"),
        (10.0, 1.5, "seed must"),
        (10.0, True, "seed must"),
    ],
)
def test_wrong_horizons_and_seeds_are_refused(horizon: float, seed, message: str) -> None:
    """Horizon positive and of feasible size; seed a whole number, a sequence or a generator."""
    with pytest.raises(InputError, match=message):
        mix({"a": 1.0}).sample(horizon, seed)


def test_requests_at_one_instant_stay_in_order() -> None:
    """Many ties: a sort that is not stable mixes them."""
    times = np.repeat([2.0, 1.0], 5_000)
    assert np.array_equal(_in_order(times), np.concatenate([np.arange(5_000, 10_000), np.arange(5_000)]))
