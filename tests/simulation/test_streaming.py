"""Runs in pieces: the run of the whole path, its measures from sums, its requests from the same streams."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_cases import KINDS, cases
from numpy.testing import assert_allclose, assert_array_equal
from simulation_cases import engine_table, path_of, server_of

import fluidsched as fs
from fluidsched.errors import InputError, SimulationError
from fluidsched.simulation import run as run_module
from fluidsched.simulation import simulate, streaming
from fluidsched.simulation.histogram import RELATIVE_ERROR
from fluidsched.simulation.kernel import run_kernel
from fluidsched.simulation.laws import Accounts
from fluidsched.simulation.limits import forecasts, within_model_length
from fluidsched.simulation.measures import DISTRIBUTIONS, QUANTILES, Requests
from fluidsched.simulation.streaming import run_pieces
from fluidsched.simulation.tally import Tally
from fluidsched.workload import ArrivalPath, RequestType, Workload

FIRST = 2.0**-20  # durations below count as zero
FLAT = Workload(
    [
        RequestType("chat", 6.0, fs.lengths.uniform(1, 40), fs.lengths.geometric(9, maximum=60)),
        RequestType("long", 1.0, 60, 30),
    ],
    name="flat",
)
SERVER = server_of(400, fs.IterationTime.affine(0.05, 1e-4, 1e-3, 1e-5), max_batch_size=16)


class Collector(Tally):
    """Keeps what is folded."""

    def __init__(self, end: float) -> None:
        super().__init__(0.0, end, ("a", "b", "c"), {})
        self.kept: list[Requests] = []

    def fold(self, requests: Requests, type_of: np.ndarray, end: float) -> None:
        self.kept.append(requests)
        super().fold(requests, type_of, end)

    def column(self, name: str) -> np.ndarray:
        """A column of all requests by arrival, prompt and output, which identify them up to equals."""
        whole = {field: np.concatenate([getattr(r, field) for r in self.kept]) for field in (*SORTED, name)}
        return whole[name][np.lexsort([whole[field] for field in reversed(SORTED)])]


SORTED = ("arrival", "prompt", "output", "finish", "admitted", "first_token")


def cut(path: ArrivalPath, ends: list[float]) -> list[ArrivalPath]:
    """Requests before each end, from the end before on."""
    places = np.searchsorted(path.arrival_s, ends)
    pairs = itertools.pairwise([0, *places.tolist()])
    return [
        dataclasses.replace(path.selected(slice(a, b)), horizon=end)
        for (a, b), end in zip(pairs, ends, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_pieces_make_the_run_of_the_whole(kind, data):
    """Times that are exact in floating point: every request and counter equal, wherever the path is cut; laws kept."""
    case = data.draw(cases(kind, dyadic=True))
    assume(not forecasts(case.table))  # runs without records refuse them
    case = dataclasses.replace(  # runs in pieces know no deadlines
        case,
        path=dataclasses.replace(case.path, patience_s=None, abort_after_s=None),
        server=dataclasses.replace(case.server, waiting_timeout=None, total_timeout=None),
    )
    horizon = case.horizon or 64.0
    warmup = min(case.warmup, horizon / 2)
    path = dataclasses.replace(case.path.selected(case.path.arrival_s < horizon), horizon=horizon)
    ends = sorted(data.draw(st.lists(st.integers(1, 400).map(lambda n: n * 0.25), max_size=4, unique=True)))
    pieces = cut(path, [end for end in ends if end < horizon] + [horizon])
    tally = Collector(horizon)
    found = run_pieces(
        pieces,
        case.server,
        case.table,
        tally,
        horizon=horizon,
        warmup=warmup,
        occupancy_points=case.points,
        accounts=Accounts(case.server, warmup=warmup, lossless=case.table.preemption != "restart"),
    )
    whole = run_kernel(
        path, case.server, case.table, horizon=horizon, warmup=warmup, occupancy_points=case.points
    )
    per_request = ("admitted_s", "first_token_s", "finish_s", "left_s", "preemptions", "status")
    for field in dataclasses.fields(whole):  # the occupancy series also looks where pieces begin
        if field.name not in (*per_request, "occupancy"):
            assert_array_equal(getattr(found, field.name), getattr(whole, field.name), err_msg=field.name)
    expected = Collector(horizon)
    expected.kept = [Requests.of(within_model_length(path, case.server), whole)]
    for name in (*SORTED, "status"):
        assert_array_equal(tally.column(name), expected.column(name), err_msg=name)


@pytest.fixture
def small_pieces(monkeypatch):
    """Runs without records in pieces of a hundred requests."""
    pieces = Workload.pieces
    monkeypatch.setattr(
        Workload, "pieces", lambda self, horizon, seed: pieces(self, horizon, seed, requests=100)
    )
    monkeypatch.setattr(run_module, "PIECE", 100)


@pytest.mark.parametrize("replay", [False, True])
def test_measures_are_those_with_records(small_pieces, replay):
    """Counts equal, means up to rounding, quantiles within the stated error; all names the same."""
    tables = [engine_table(), engine_table("sarathi", token_budget=32)]
    options = {"horizon": 200.0, "warmup": 40.0, "slo": {"ttft": 0.3, "tpot": 0.2}}
    given = FLAT.sample(200.0, seed=4) if replay else FLAT
    options |= {} if replay else {"replications": 3, "seed": 4}
    with_records = simulate(given, SERVER, tables, **options)
    without = simulate(given, SERVER, tables, records=False, **options)
    assert without.policies == with_records.policies
    for policy in without.policies:
        exact, counted = with_records.outcome(policy), without.outcome(policy)
        assert list(exact.values) == list(counted.values)
        assert exact.verdicts == counted.verdicts
        for name, values in exact.values.items():
            assert_array_equal(counted.lower_bounds[name], exact.lower_bounds[name], err_msg=name)
            assert_allclose(counted.values[name], values, err_msg=name, **tolerance(name))
        assert without.verdict(policy) == with_records.verdict(policy)
    keys = ["policy", "type", "measure"]
    exact, counted = (runs.by_type().set_index(keys) for runs in (with_records, without))
    assert exact.index.equals(counted.index)
    assert_array_equal(counted["lower_bound"], exact["lower_bound"])
    for key, row in exact.iterrows():
        assert_allclose(counted.loc[key, "estimate"], row["estimate"], err_msg=str(key), **tolerance(key[2]))


def tolerance(measure: str) -> dict[str, float]:
    """How far a measure counted may be from the one with records."""
    word, _, of = measure.partition("_")
    if word in QUANTILES and of in DISTRIBUTIONS and of != "itl":
        return {"rtol": RELATIVE_ERROR * (1 + 1e-9), "atol": FIRST}
    return {"rtol": 1e-9}


def test_batches_are_those_with_records(small_pieces):
    """Interval and number of batches of means and rates, from 64 parts joined as needed."""
    options = {"horizon": 3000.0, "warmup": 100.0, "seed": 3, "replications": 1}
    one, other = (
        simulate(FLAT, SERVER, engine_table(), records=records, **options)
        .batch_means("vllm")
        .set_index("measure")
        for records in (True, False)
    )
    for name in ("mean_ttft", "request_throughput", "mean_slowdown", "effective_throughput"):
        assert_allclose(
            other.loc[name].iloc[1:].to_numpy(float), one.loc[name].iloc[1:].to_numpy(float), rtol=1e-6
        )


def test_a_run_without_records_says_what_it_has_not(small_pieces):
    runs = simulate(FLAT, SERVER, engine_table(), horizon=50.0, replications=1, records=False)
    assert runs.occupancy("vllm").shape[1] == 4
    assert set(runs.by_type()["type"]) == {"chat", "long"}
    for call in (lambda: runs.requests("vllm"), lambda: runs.with_slo({"ttft": 1.0})):
        with pytest.raises(InputError, match="run without records"):
            call()
    assert fs.SimulationResult.from_dict(runs.to_dict()).summary().equals(runs.summary())


@pytest.mark.parametrize(
    ("change", "named"),
    [({"engine": "reference"}, "records"), ({"warmup": "mser5"}, "records")],
)
def test_what_needs_records_is_refused(change, named):
    with pytest.raises(InputError, match=named):
        simulate(FLAT, SERVER, engine_table(), **{"horizon": 50.0, "records": False, **change})


def test_a_replayed_path_needs_a_horizon():
    with pytest.raises(InputError, match="horizon"):
        simulate(path_of((0.0, 1, 1)), server_of(), engine_table(), records=False)


@pytest.mark.parametrize(
    ("change", "law"),
    [
        ({"wasted_tokens": 1}, "tokens are conserved"),
        ({"emitted_tokens": -1}, "every token but the first ends a gap"),
        ({"waiting_s": 1.0}, "Little's law for requests"),
        ({"kv_token_s": 1e9}, "no request holds more"),
        ({"preempted": 1}, "preemptions add up"),
        ({"peak_kv": 400}, "KV within capacity"),
        ({"busy_s": 60.0}, "busy time"),
        ({}, None),
    ],
)
def test_a_run_without_records_that_breaks_a_law_is_found(small_pieces, monkeypatch, change, law):
    """`check=True` needs no records for the laws of sums: one counter is falsified, and that law named."""
    end = streaming._engine_run

    def falsified(*arguments):
        run = end(*arguments)
        return dataclasses.replace(run, **{name: getattr(run, name) + more for name, more in change.items()})

    monkeypatch.setattr(streaming, "_engine_run", falsified)
    arguments = {"horizon": 60.0, "replications": 1, "records": False, "check": True}
    if law is None:
        assert simulate(FLAT, SERVER, engine_table(), **arguments).replications == 1
        return
    with pytest.raises(SimulationError, match=law):
        simulate(FLAT, SERVER, engine_table(), **arguments)


def test_a_request_out_of_order_is_found_before_it_is_forgotten(small_pieces, monkeypatch):
    fold = streaming._fold

    def falsified(tally, accounts, run, *others):
        run.admitted[0] = run.arrival[0] - 1.0
        fold(tally, accounts, run, *others)

    monkeypatch.setattr(streaming, "_fold", falsified)
    with pytest.raises(SimulationError, match="arrival ≤ admission"):
        simulate(FLAT, SERVER, engine_table(), horizon=60.0, replications=1, records=False, check=True)


def test_oversize_requests_are_named_or_rejected(small_pieces):
    path = dataclasses.replace(path_of((0.0, 2, 2), (1.0, 500, 2), (2.0, 2, 2)), horizon=9.0)
    with pytest.raises(InputError, match="request 1"):
        simulate(path, SERVER, engine_table(), records=False)
    runs = simulate(path, SERVER, engine_table(), records=False, oversize="reject", warmup=0.0)
    assert runs.measures("vllm")["rejected"].tolist() == [1.0]
    assert runs.measures("vllm")["completed"].tolist() == [2.0]


def test_records_that_do_not_fit_are_refused_before_anything_is_allocated(monkeypatch):
    """The message says what they take, what there is, and the way out."""
    monkeypatch.setattr(run_module, "available_memory", lambda: 2.0**30)
    with pytest.raises(InputError, match=r"GiB.*records=False"):
        simulate(FLAT, SERVER, engine_table(), horizon=1e7, replications=2)


PROCESSES = {
    "poisson": fs.arrivals.poisson(),
    "profile": fs.arrivals.time_varying([0.2, 0.0, 3.0], step=2.0),
    "even": fs.arrivals.renewal(cv=0.0),
    "bursty": fs.arrivals.renewal(cv=3.0),
    "smooth": fs.arrivals.renewal(cv=0.4),
    "modulated": fs.arrivals.markov_modulated([5.0, 0.0, 1.0], [0.3, 0.7, 2.0]),
    "batches": fs.arrivals.batches(fs.lengths.uniform(1, 5), fs.arrivals.renewal(cv=2.0)),
    "users": fs.arrivals.closed_loop(7, think_cv=1.5, response_share=0.2),
    "together": fs.arrivals.superposition(
        [fs.arrivals.renewal(cv=0.5), fs.arrivals.markov_modulated([1.0, 4.0], [0.5, 0.5])], [0.7, 0.3]
    ),
}


@settings(max_examples=60, deadline=None)
@given(
    requests=st.integers(1, 300),
    horizon=st.floats(0.5, 60.0),
    seed=st.integers(0, 2**32),
    process=st.sampled_from(sorted(PROCESSES)),
    cached=st.booleans(),
    prediction=st.sampled_from([None, fs.predictions.lognormal(0.5), fs.predictions.interval(2)]),
)
def test_pieces_of_a_workload_are_its_sample(requests, horizon, seed, process, cached, prediction):
    """Bit by bit, whatever the process and the size of the pieces; each piece lies in its stretch of time."""
    workload = FLAT.with_cached_prefixes(0.4) if cached else FLAT
    workload = workload.with_arrivals(PROCESSES[process]).with_predictions(prediction)
    whole = workload.sample(horizon, seed)
    pieces = list(workload.pieces(horizon, seed, requests=requests))
    begin = 0.0
    for piece in pieces:
        assert piece.horizon is not None
        assert len(piece) == 0 or begin <= piece.arrival_s[0] <= piece.arrival_s[-1] < piece.horizon
        begin = piece.horizon
    assert begin == horizon
    for name, column in whole.to_frame().items():
        parts = [piece.to_frame()[name].to_numpy() for piece in pieces]
        assert_array_equal(np.concatenate(parts), column, err_msg=name)


@pytest.mark.parametrize("process", PROCESSES)
@settings(max_examples=8, deadline=None)
@given(size=st.integers(1, 700), seed=st.integers(0, 2**32))
def test_times_do_not_depend_on_how_they_are_cut(process, size, seed):
    """Bit by bit the times of one draw; no piece is empty."""
    whole = PROCESSES[process].sample(3.0, 200.0, np.random.default_rng(seed))
    drawn, pieces = 0, []
    for piece in PROCESSES[process].pieces(3.0, np.random.default_rng(seed), size):
        assert len(piece) > 0
        pieces.append(piece)
        drawn += len(piece)
        if piece[-1] >= 200.0:
            break
    times = np.concatenate(pieces)
    assert_array_equal(times[times < 200.0], whole)


def test_requests_that_may_leave_are_not_drawn_in_pieces():
    leaving = Workload([RequestType("chat", 1.0, 5, 5, patience=3.0)])
    with pytest.raises(InputError, match="patience of type 'chat'"):
        next(leaving.pieces(9.0, 1))
