"""Arrival processes: exact laws of their counts and gaps, and the rules that common random numbers rest on.

Statistical tests fix a seed; with a random one each would reject a correct sampler with probability 1e-6
(`ERROR_RATE`, divided among the parts of a test), exactly or, where said, in the normal approximation.
"""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.linalg import expm

import fluidsched as fs
from fluidsched import arrivals
from fluidsched._files import dumps
from fluidsched.errors import InputError

ERROR_RATE = 1e-6
HORIZON = 16.0

cvs = st.sampled_from([0.0, 0.3, 1.0, 2.5, 20.0])
positive = st.floats(0.125, 8)
levels = st.lists(st.floats(0.125, 8) | st.just(0.0), min_size=2, max_size=4).filter(any)
simple = st.one_of(
    st.builds(arrivals.poisson),
    st.builds(arrivals.renewal, cvs),
    st.builds(arrivals.closed_loop, st.integers(1, 5), cvs, st.sampled_from([0.0, 0.4])),
    levels.flatmap(
        lambda r: st.builds(
            arrivals.markov_modulated,
            st.just(r),
            st.lists(positive, min_size=len(r), max_size=len(r)),
            st.sampled_from([None, np.roll(np.eye(len(r)), 1, axis=0)]),
        )
    ),
    levels.flatmap(
        lambda r: st.builds(
            arrivals.time_varying,
            st.just(r),
            positive | st.lists(positive, min_size=len(r), max_size=len(r)),
        )
    ),
)
processes = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.builds(arrivals.batches, st.just(fs.lengths.uniform(1, 4)) | st.integers(1, 3), inner),
        st.lists(inner, min_size=1, max_size=3).flatmap(
            lambda parts: st.builds(
                arrivals.superposition,
                st.just(parts),
                st.lists(positive, min_size=len(parts), max_size=len(parts)),
            )
        ),
    ),
    max_leaves=3,
)
seeds = st.integers(0, 2**32)


def times(process: arrivals.ArrivalProcess, rate: float, horizon: float, seed: int) -> np.ndarray:
    return process.sample(rate, horizon, np.random.default_rng(seed))


def draws(process: arrivals.ArrivalProcess, rate: float, horizon: float, count: int, seed: int) -> list:
    """`count` independent paths."""
    rng = np.random.default_rng(seed)
    return [process.sample(rate, horizon, rng) for _ in range(count)]


def pearson(counts: np.ndarray, law: np.ndarray) -> float:
    """p-value of Pearson's test of counts against P(N = 0), P(N = 1), ...; the tail joined, ≥ 8 expected each."""
    last = int(np.flatnonzero(len(counts) * law >= 8)[-1])
    law = np.append(law[: last + 1], 1 - law[: last + 1].sum())
    observed = np.bincount(np.minimum(counts, last + 1), minlength=last + 2)
    keep = len(counts) * law >= 8
    cells, expected = observed[keep], len(counts) * law[keep]
    if not keep.all():
        cells, expected = np.append(cells, observed[~keep].sum()), np.append(expected, 0.0)
        expected[-1] = len(counts) - expected.sum()
    return float(stats.chisquare(cells, expected).pvalue)


@given(processes, seeds, positive)
def test_times_ascend_inside_the_window(process: arrivals.ArrivalProcess, seed: int, rate: float) -> None:
    """0 ≤ t_1 ≤ t_2 ≤ ... < horizon, all finite; the same seed gives the same bytes."""
    drawn = times(process, rate, HORIZON, seed)
    assert np.all(np.isfinite(drawn))
    assert np.all(np.diff(drawn) >= 0)
    assert not len(drawn) or (drawn[0] >= 0 and drawn[-1] < HORIZON)
    assert times(process, rate, HORIZON, seed).tobytes() == drawn.tobytes()


@given(processes, seeds, positive, st.floats(0.5, 15))
def test_a_longer_horizon_only_adds(
    process: arrivals.ArrivalProcess, seed: int, rate: float, short: float
) -> None:
    """The arrivals before the shorter horizon are the same, and all of them."""
    long = times(process, rate, HORIZON, seed)
    np.testing.assert_array_equal(times(process, rate, short, seed), long[long < short])


@given(processes, seeds, positive)
def test_speeding_up_divides_times(process: arrivals.ArrivalProcess, seed: int, rate: float) -> None:
    """Rate 4λ on a clock 4 times as fast: the same path in a quarter of the time, exactly (a power of two)."""
    fast = times(process.accelerated(4.0), 4 * rate, HORIZON / 4, seed)
    np.testing.assert_array_equal(4 * fast, times(process, rate, HORIZON, seed))
    assert process.accelerated(4.0).accelerated(0.25) == process
    assert process.accelerated(4.0).dispersion(4 * rate) == pytest.approx(process.dispersion(rate))


@given(processes)
def test_json_round_trip(process: arrivals.ArrivalProcess) -> None:
    """Plain data and back: an equal process with an equal hash; it survives pickling."""
    back = arrivals.from_dict("arrivals", json.loads(dumps(process.to_dict())))
    assert back == process
    assert hash(back) == hash(process)
    assert pickle.loads(pickle.dumps(process)) == process


EXAMPLES = {
    "poisson": arrivals.poisson(),
    "equal gaps": arrivals.renewal(0),
    "smooth": arrivals.renewal(0.5),
    "bursty": arrivals.renewal(3),
    "modulated": arrivals.markov_modulated([1, 0, 6], [2.0, 1.0, 0.5], [[0, 1, 0], [0.5, 0, 0.5], [1, 0, 0]]),
    "batches": arrivals.batches(fs.lengths.empirical([1, 2, 9], [5, 3, 1])),
    "batches of bursts": arrivals.batches(2, arrivals.markov_modulated([1, 5], [1.0, 0.5])),
    "closed loop": arrivals.closed_loop(5, think_cv=2.0, response_share=0.3),
    "superposition": arrivals.superposition([arrivals.renewal(2), arrivals.renewal(0)], [2, 1]),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_mean_count_is_rate_times_window_also_when_short(name: str) -> None:
    """E N(h) = λh already for h = 0.7/λ: the process is stationary from the start. Normal approximation."""
    counts = np.array([len(t) for t in draws(EXAMPLES[name], 2.0, 0.35, 6000, seed=11)])
    z = (counts.mean() - 0.7) / (counts.std() / np.sqrt(len(counts)))
    assert abs(z) < stats.norm.isf(ERROR_RATE / 2)


@pytest.mark.parametrize("name", EXAMPLES)
def test_dispersion_of_long_windows(name: str) -> None:
    """Var N(H) of 500 windows of 1 500 requests is I(∞)·λH: χ² with 499 degrees, counts being nearly normal.

    For equal gaps the count is one of the two whole numbers beside λH.
    """
    process, rate, horizon = EXAMPLES[name], 3.0, 500.0
    counts = np.array([len(t) for t in draws(process, rate, horizon, 500, seed=12)])
    limit = process.dispersion(rate)
    if limit == 0:
        assert set(counts.tolist()) <= {1499, 1500, 1501}
        return
    ratio = counts.var() * len(counts) / (limit * rate * horizon)
    assert stats.chi2(499).ppf(ERROR_RATE / 2) < ratio < stats.chi2(499).isf(ERROR_RATE / 2)


@pytest.mark.parametrize("cv", [0.3, 1.0, 1.5])
def test_gaps_of_a_renewal_process_are_gamma(cv: float) -> None:
    """Kolmogorov–Smirnov test of 20 000 gaps against Gamma(1/cv²) of mean 1/λ; neighbours uncorrelated.

    (Of much burstier gaps a few per cent are too short to be seen in the difference of two times.)
    """
    drawn = times(arrivals.renewal(cv), 4.0, 5000.0, seed=3)
    gaps = np.diff(drawn)
    assert stats.kstest(gaps, stats.gamma(1 / cv**2, scale=cv**2 / 4.0).cdf).pvalue > ERROR_RATE
    correlation = np.corrcoef(gaps[:-1], gaps[1:])[0, 1]
    assert abs(correlation) < stats.norm.isf(ERROR_RATE / 2) / np.sqrt(len(gaps) - 1)


@pytest.mark.parametrize("cv", [0.0, 0.5, 3.0])
def test_first_gap_has_the_stationary_excess_law(cv: float) -> None:
    """P(t_1 ≤ x) = λ ∫_0^x P(gap > y) dy = x(1 − F_k(x)) + F_{k+1}(x) at λ = 1; uniform when gaps are equal."""
    first = [t[0] for t in draws(arrivals.renewal(cv), 1.0, 200.0, 3000, seed=4)]
    if cv == 0:
        law = stats.uniform().cdf
    else:
        k = 1 / cv**2
        gap, biased = (stats.gamma(shape, scale=1 / k) for shape in (k, k + 1))

        def law(x: np.ndarray) -> np.ndarray:
            return x * gap.sf(x) + biased.cdf(x)

    assert stats.kstest(first, law).pvalue > ERROR_RATE


def test_equal_gaps_are_equal() -> None:
    """cv = 0: a clock with a random phase."""
    np.testing.assert_allclose(np.diff(times(arrivals.renewal(0), 4.0, 100.0, 1)), 0.25, rtol=1e-9)


def modulated_law(rates: np.ndarray, generator: np.ndarray, start: np.ndarray, h: float, size: int) -> tuple:
    """P(t_1 > h) and P(N(h) = n), n < size, of a Markov-modulated Poisson process by matrix exponentials."""
    states = len(rates)
    quiet = generator - np.diag(rates)
    blocks = np.kron(np.eye(size), quiet) + np.kron(np.eye(size, k=1), np.diag(rates))
    counts = (start @ expm(blocks * h)[:states]).reshape(size, states).sum(axis=1)
    return float((start @ expm(quiet * h)).sum()), counts


def test_counts_of_a_modulated_process_have_their_exact_law() -> None:
    """5 000 windows against P(N(h) = n) from the matrix exponential, Pearson; three states, one silent."""
    rate, h = 2.0, 1.5
    jumps = np.array([[0, 1, 0], [0.5, 0, 0.5], [1, 0, 0]])
    stays, relative = np.array([2.0, 1.0, 0.5]), np.array([1.0, 0.0, 6.0])
    generator = (jumps - np.eye(3)) / stays[:, None]
    visits = np.array([2, 2, 1]) / 5  # balance of the jump chain by hand
    start = visits * stays / (visits @ stays)
    rates = rate * relative / (start @ relative)
    none, law = modulated_law(rates, generator, start, h, 40)
    assert none == pytest.approx(law[0])
    drawn = draws(arrivals.markov_modulated(relative, stays, jumps), rate, h, 5000, seed=5)
    assert pearson(np.array([len(t) for t in drawn]), law) > ERROR_RATE


def test_variance_of_a_two_state_modulated_process() -> None:
    """I(∞) = 1 + 2 (r1 − r2)² π1 π2 / ((q1 + q2) λ), the textbook form, equals the deviation-matrix form."""
    process = arrivals.markov_modulated([1, 4], [3.0, 2.0])
    shares, leave, rate = np.array([0.6, 0.4]), np.array([1 / 3, 1 / 2]), 5.0
    rates = rate * np.array([1, 4]) / (shares @ [1, 4])
    closed = 1 + 2 * (rates[0] - rates[1]) ** 2 * shares.prod() / (leave.sum() * rate)
    assert process.dispersion(rate) == pytest.approx(closed, rel=1e-12)


def test_time_varying_counts_are_independent_poisson() -> None:
    """Counts per step over 400 periods: Σ (n − m)²/m is χ² (normal approximation, m ≥ 40); times uniform inside."""
    relative, steps = np.array([1.0, 0.0, 5.0, 2.0]), np.array([2.0, 1.0, 0.5, 1.5])
    process = arrivals.time_varying(relative, steps)
    rate, period = 60.0, 5.0
    drawn = times(process, rate, 400 * period, seed=6)
    edges = np.concatenate([[0], np.cumsum(steps)])
    turn, phase = np.divmod(drawn, period)
    step = np.searchsorted(edges, phase, side="right") - 1
    means = rate * period * relative * steps / (relative @ steps)
    counts = np.histogram2d(turn, step, bins=(np.arange(401), np.arange(5)))[0]
    assert counts[:, 1].sum() == 0
    busy = [0, 2, 3]
    statistic = ((counts[:, busy] - means[busy]) ** 2 / means[busy]).sum()
    law = stats.chi2(400 * len(busy))
    assert law.ppf(ERROR_RATE / 4) < statistic < law.isf(ERROR_RATE / 4)
    inside = (phase - edges[step]) / steps[step]
    assert stats.kstest(inside, "uniform").pvalue > ERROR_RATE / 2


@given(st.floats(0.1, 20), seeds)
def test_a_flat_profile_is_poisson(step: float, seed: int) -> None:
    """A profile that does not vary brings the Poisson times of the same stream."""
    flat = times(arrivals.time_varying([3, 3], step), 2.0, HORIZON, seed)
    np.testing.assert_allclose(flat, times(arrivals.poisson(), 2.0, HORIZON, seed), rtol=1e-12)


def test_batches_are_compound_poisson() -> None:
    """6 000 windows against Panjer's recursion, P(N = n) = (m/n) Σ_b b P(B = b) P(N = n − b); Pearson."""
    law = fs.lengths.empirical([1, 2, 5], [3, 2, 1])
    rate, h = 2.0, 1.5
    mean = rate / law.mean * h
    panjer = np.zeros(60)
    panjer[0] = np.exp(-mean)
    for n in range(1, 60):
        sizes = zip(law.values.tolist(), law.weights.tolist(), strict=True)
        panjer[n] = mean / n * sum(b * w * panjer[n - b] for b, w in sizes if b <= n)
    drawn = draws(arrivals.batches(law), rate, h, 6000, seed=7)
    assert pearson(np.array([len(t) for t in drawn]), panjer) > ERROR_RATE


def test_closed_loop_counts_are_binomial_while_every_user_waits() -> None:
    """In a window shorter than the response each of 20 users asks at most once, with probability λh/20."""
    process = arrivals.closed_loop(20, think_cv=1.5, response_share=0.4)
    rate, h = 5.0, 1.5  # a user's cycle is 4 s, of which 1.6 s response
    counts = np.array([len(t) for t in draws(process, rate, h, 6000, seed=8)])
    assert pearson(counts, stats.binom(20, rate * h / 20).pmf(np.arange(21))) > ERROR_RATE


def test_one_user_repeats_response_and_think_time() -> None:
    """Gaps of a single user: a constant response plus gamma think time; Kolmogorov–Smirnov, 20 000 gaps."""
    drawn = times(arrivals.closed_loop(1, think_cv=0.5, response_share=0.4), 2.0, 10_000.0, seed=9)
    law = stats.gamma(4, loc=0.2, scale=0.3 / 4)
    assert stats.kstest(np.diff(drawn), law.cdf).pvalue > ERROR_RATE


def test_workload_with_processes_round_trips(tmp_path) -> None:
    """The process is part of the workload's JSON, fingerprint and printed form; Poisson is left out."""
    plain = fs.Workload([fs.RequestType("a", 1.0, 10, 5), fs.RequestType("b", 2.0, 10, 5)])
    assert "arrivals" not in plain.to_json()
    for process in EXAMPLES.values():
        workload = plain.with_arrivals(process)
        assert fs.Workload.from_json(_written(workload, tmp_path / "w.json")) == workload
        assert (workload == plain) == (process == arrivals.poisson())
        assert workload.with_arrivals(arrivals.poisson()) == plain


def test_workloads_show_their_processes() -> None:
    """A common process stands in the first line, differing ones with their types, Poisson nowhere."""
    a, b = fs.RequestType("a", 1.0, 10, 5), fs.RequestType("b", 2.0, 10, 5, arrivals=arrivals.renewal(2))
    assert "poisson" not in repr(fs.Workload([a]))
    mixed = repr(fs.Workload([a, b])).splitlines()
    assert mixed[0].endswith("3 req/s")
    assert mixed[1].endswith("poisson()")
    assert mixed[2].endswith("renewal(cv=2)")
    same = fs.Workload([a, b]).with_arrivals(arrivals.renewal(3)).with_predictions(fs.predictions.exact())
    assert repr(same).splitlines()[0].endswith("3 req/s, renewal(cv=3), outputs predicted exact()")


def _written(workload: fs.Workload, file):
    workload.to_json(file)
    return file


@given(processes, seeds)
def test_scaled_workload_brings_the_same_requests_sooner(process: arrivals.ArrivalProcess, seed: int) -> None:
    """`scaled(2)` over half the horizon: the same lengths and types at half the times, exactly."""
    types = [fs.RequestType("a", 2.0, 10, fs.lengths.uniform(1, 9)), fs.RequestType("b", 1.0, 7, 3)]
    workload = fs.Workload(types).with_arrivals(process)
    slow, fast = workload.sample(32.0, seed), workload.scaled(2.0).sample(16.0, seed)
    np.testing.assert_array_equal(fast.arrival_s * 2, slow.arrival_s)
    for column in ("output_tokens", "type"):
        np.testing.assert_array_equal(getattr(fast, column), getattr(slow, column))


@given(processes, processes, seeds)
def test_a_type_keeps_its_times_whatever_the_others_do(
    one: arrivals.ArrivalProcess, other: arrivals.ArrivalProcess, seed: int
) -> None:
    """Another type's process does not touch a type's own requests."""
    a = fs.RequestType("a", 2.0, 10, fs.lengths.uniform(1, 9), arrivals=one)
    alone = fs.Workload([a]).sample(HORIZON, seed)
    both = fs.Workload([fs.RequestType("b", 1.0, 7, 3, arrivals=other), a]).sample(HORIZON, seed)
    np.testing.assert_array_equal(both.arrival_s[both.type == 1], alone.arrival_s)
    np.testing.assert_array_equal(both.output_tokens[both.type == 1], alone.output_tokens)


def test_the_fluid_program_sees_only_rates() -> None:
    """The process changes nothing in the fluid solution; other rates keep the process and its clock."""
    server = fs.Server(100_000, fs.IterationTime.affine(0.01, 5e-5, 5e-5, 3e-7))
    plain = fs.Workload([fs.RequestType("a", 4.0, 500, 50)])
    bursty = plain.with_arrivals(arrivals.markov_modulated([1, 5], [60.0, 10.0]))
    assert fs.solve_fluid(bursty, server).critical_rate == fs.solve_fluid(plain, server).critical_rate
    assert bursty.with_rates([8.0]).types[0].arrivals == bursty.types[0].arrivals
    assert bursty.scaled(2.0).types[0].arrivals == arrivals.markov_modulated([1, 5], [30.0, 5.0])
    assert bursty.scaled(0.0).sample(10.0, 1).rate == 0.0


def test_joined_types_superpose_their_arrivals() -> None:
    """Parts of one profile stay that profile; others become a superposition with the shares of the rates."""
    path = fs.ArrivalPath.from_arrays([0, 1, 2, 4], [10, 10, 900, 900], [5, 80, 5, 80])
    workload = path.to_workload(types=4)
    profile = arrivals.time_varying([1, 2], 300)
    assert workload.with_arrivals(profile).merged(1).types[0].arrivals == profile
    joined = workload.with_arrivals(arrivals.renewal(3)).merged(2).types[0].arrivals
    assert joined == arrivals.superposition([arrivals.renewal(3)] * 2, [0.25, 0.25])
    assert joined.dispersion(0.5) == pytest.approx(9.0)
    idle = arrivals.superposition([arrivals.renewal(3), profile], [0, 2])
    assert idle == profile


def test_ten_thousand_types_construct_in_linear_time() -> None:
    """Doubling the number of types doubles the work: names are looked up in a set, not compared in pairs."""
    law = fs.lengths.joint([10], [5])
    types = [fs.RequestType(f"type {i}", 1.0, lengths=law) for i in range(10_000)]

    class Counting(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Counting.compared += 1
            return str.__eq__(self, other)

    for member in types:
        object.__setattr__(member, "name", Counting(member.name))
    assert len(fs.Workload(types)) == 10_000
    assert Counting.compared < 10_000
    with pytest.raises(InputError, match=r"types\[10000\].name must be unique"):
        fs.Workload([*types, types[0]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: arrivals.renewal(-1), "cv must be a finite number of at least 0, at most 100"),
        (lambda: arrivals.renewal(float("nan")), "cv must be a finite number"),
        (lambda: arrivals.markov_modulated([1], [1]), "relative_rate must have at least 2"),
        (lambda: arrivals.markov_modulated([0, 0], [1, 1]), "relative_rate must have a positive entry"),
        (lambda: arrivals.markov_modulated([1, 2], [1]), "mean_sojourn must hold 2"),
        (
            lambda: arrivals.markov_modulated([1, 2], [1, 0]),
            r"mean_sojourn\[1\] must be a finite number above 0",
        ),
        (lambda: arrivals.markov_modulated([1, 2], [1, 1], [[0, 1]]), "transition must be 2 rows"),
        (
            lambda: arrivals.markov_modulated([1, 2], [1, 1], [[0, 1], [0.5, 0.5]]),
            r"transition\[1\] must sum",
        ),
        (
            lambda: arrivals.markov_modulated([1, 2, 3], [1] * 3, [[0, 1, 0], [1, 0, 0], [1, 0, 0]]),
            "no way from state 0 to 2",
        ),
        (lambda: arrivals.time_varying([], 1), "relative_rate must hold at least one"),
        (lambda: arrivals.time_varying([0.0], 1), "positive entry"),
        (lambda: arrivals.time_varying([1, -1], 1), r"relative_rate\[1\]"),
        (lambda: arrivals.time_varying([1, 2], 0), "step must be a finite number above 0"),
        (lambda: arrivals.time_varying([1, 2], [1]), "step must hold 2"),
        (lambda: arrivals.time_varying("12", 1), "relative_rate must be a list of numbers"),
        (lambda: arrivals.batches(0), "size must be a whole number of at least 1"),
        (lambda: arrivals.batches(2, "poisson"), "epochs must be an arrival process"),
        (lambda: arrivals.closed_loop(0), "users must be a whole number of at least 1"),
        (lambda: arrivals.closed_loop(3, 1.0, 1.0), "response_share must"),
        (lambda: arrivals.superposition([arrivals.poisson()], [0]), "shares must have a positive entry"),
        (lambda: arrivals.superposition([], []), "shares must hold at least one"),
        (lambda: arrivals.superposition([3], [1]), r"processes\[0\] must be an arrival process"),
        (lambda: arrivals.poisson().sample(-1, 1, np.random.default_rng(1)), "rate must"),
        (lambda: arrivals.poisson().sample(1e9, 1, np.random.default_rng(1)), "expected requests"),
        (
            lambda: arrivals.markov_modulated([1, 2], [1e-9, 1e-9]).sample(1, 1, np.random.default_rng(1)),
            "expected changes of the rate",
        ),
        (
            lambda: arrivals.time_varying([1, 0], [1, 1e9]).sample(1e6, 10, np.random.default_rng(1)),
            "expected requests",
        ),
        (lambda: fs.RequestType("a", 1.0, 5, 5, arrivals=2.0), "arrivals of type 'a' must be an arrival"),
        (lambda: arrivals.time_varying([1, 2], 1).accelerated(-1.0), r"step\[0\] must"),
        (lambda: arrivals.markov_modulated([1, 2], [1, 1]).accelerated(1e-320), r"mean_sojourn\[0\] must"),
        (lambda: arrivals.from_dict("x", 3), 'x must be an object with the field "process"'),
        (lambda: arrivals.from_dict("x", {"process": "renewa1", "cv": 1}), "Did you mean 'renewal'"),
        (lambda: arrivals.from_dict("x", {"process": "renewal"}), "x.cv must be given"),
        (lambda: arrivals.from_dict("x", {"process": "renewal", "cv": "1"}), "x.cv must be a finite"),
        (lambda: arrivals.from_dict("x", {"process": "batches", "size": 0}), "x.size must be a whole"),
        (
            lambda: arrivals.from_dict("x", {"process": "batches", "size": 2, "epochs": {"process": "p"}}),
            "x.epochs.process must be one of",
        ),
        (
            lambda: arrivals.from_dict("x", {"process": "superposition", "processes": 1, "shares": [1]}),
            "a list",
        ),
    ],
)
def test_wrong_arguments_are_refused(make, message: str) -> None:
    """Each error names the argument and what it must be."""
    with pytest.raises(InputError, match=message):
        make()
