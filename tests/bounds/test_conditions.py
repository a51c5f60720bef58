"""Outside its conditions no bound is a number: every public function of `fs.bounds`, every condition."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fluidsched as fs
from fluidsched import bounds
from fluidsched.bounds import Bound
from fluidsched.errors import InputError
from fluidsched.policy import Match, Segment, TableType

TIME = fs.IterationTime.affine(0.5, 0.01, 0.01, 0.001)
SERVER = fs.Server(1000, TIME)
TWO = fs.Workload([fs.RequestType("a", 2.0, 5, 3), fs.RequestType("b", 1.0, 2, 6)])
UNIT = fs.Server(50, fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0))
FUNCTION = fs.Server(1000, fs.IterationTime.function(lambda batch: 0.5))
PATH = fs.ArrivalPath.from_arrays([0.0, 1.0], [3, 4], [5, 2])


def wait(thresholds: tuple[int, int] = (4, 3), **row: Any) -> fs.PolicyTable:
    rows = [
        TableType(name, Match(label=name), threshold=n, **{"gate": n, **row})
        for name, n in zip("ab", thresholds, strict=True)
    ]
    return fs.PolicyTable("wait", "wait", rows, block_iterations=1, freeze=True)


def nested(second: int = 4, **row: Any) -> fs.PolicyTable:
    star = TableType("*", threshold=10, gate=10, **row)
    segments = [Segment(3, 10), Segment(9, second, 12.0)]
    return fs.PolicyTable("nested", "nested-wait", [star], segments=segments, block_iterations=1, freeze=True)


def mix(outputs: Any, **more: Any) -> fs.Workload:
    return fs.Workload([fs.RequestType("mix", 5.0, 7, outputs, **more)])


TWO_ENDS = mix(fs.lengths.empirical([4, 10], [0.7, 0.3]))
BURSTY = TWO.with_arrivals(fs.arrivals.renewal(cv=3.0))
LONG = fs.Workload([fs.RequestType("a", 1.0, 5, fs.lengths.geometric(mean=3.0)), TWO.types[1]])
CACHED = fs.Workload([fs.RequestType("a", 2.0, 5, 3, cached_prefix_fraction=0.5), TWO.types[1]])


def one_of_wait(name: str, *args: Any) -> Bound:
    return next(bound for bound in bounds.wait_bounds(*args) if bound.name == name)


def nested_bounds(table: fs.PolicyTable, workload: fs.Workload, server: fs.Server) -> Bound:
    """One of them, after a check that all of them say the same."""
    found = bounds.nested_wait_bounds(table, workload, server, 10.0)
    assert len({bound.condition for bound in found}) == 1
    return found[-1]


NESTED: list[tuple[Callable[[], tuple[Any, ...]], str]] = [
    (lambda: (wait(), TWO_ENDS, SERVER), "not 'nested-wait'"),
    (lambda: (nested(), TWO_ENDS, FUNCTION), "is a function"),
    (lambda: (nested(max_hold_s=1.0), TWO_ENDS, SERVER), "hold limit"),
    (lambda: (nested(), mix(fs.lengths.geometric(mean=3.0)), SERVER), "unbounded"),
    (lambda: (nested(), mix(12), SERVER), "11 decodes are possible"),
    (lambda: (nested(3), TWO_ENDS, SERVER), "p·n_(k−1) = 3 ≥ n_k = 3"),
    (lambda: (nested(), TWO_ENDS, fs.Server(100, TIME)), "tokens of 100"),
]
"""What both functions about Nested WAIT are asked."""


def condition(author: str, workload: fs.Workload, server: fs.Server) -> Bound:
    return next(b for b in bounds.stability_conditions(workload, server) if author in b.name)


RETURNED: list[tuple[Callable[..., Any], Callable[[], Bound], str]] = [
    (bounds.wait_bounds, lambda: one_of_wait("mean_ttft[a]", fs.baselines.vllm(), TWO, SERVER), "kind"),
    (bounds.wait_bounds, lambda: one_of_wait("mean_ttft[a]", wait(), TWO, FUNCTION), "is a function"),
    (bounds.wait_bounds, lambda: one_of_wait("mean_e2e[a]", wait(gate=1), TWO, SERVER), "gate below"),
    (bounds.wait_bounds, lambda: one_of_wait("mean_waiting", wait(max_hold_s=1.0), TWO, SERVER), "hold"),
    (bounds.wait_bounds, lambda: one_of_wait("memory", wait(), LONG, SERVER), "unbounded"),
    (bounds.wait_bounds, lambda: one_of_wait("memory", wait(), TWO, fs.Server(150, TIME)), "capacity of 150"),
    (
        bounds.wait_bounds,
        lambda: one_of_wait("entry_queue[b]", wait(), TWO, fs.Server(1000, TIME, max_batch_size=29)),
        "the limit is 29",
    ),
    (
        bounds.wait_bounds,
        lambda: one_of_wait("mean_ttft", wait(), TWO, fs.Server(1000, TIME, token_budget=48)),
        "the budget is 48",
    ),
    (bounds.wait_bounds, lambda: one_of_wait("mean_ttft[a]", wait(), BURSTY, SERVER), "not Poisson"),
    (bounds.wait_bounds, lambda: one_of_wait("entry_queue[a]", wait((1, 3)), TWO, SERVER), "> n = 1"),
    (bounds.wait_bounds, lambda: one_of_wait("entry_queue[b]", wait((4, 0)), TWO, SERVER), "refuses"),
    (
        bounds.wait_bounds,
        lambda: one_of_wait("mean_ttft[b]", wait(), TWO.with_rates([2.0, 0.0]), SERVER),
        "no requests arrive",
    ),
    (bounds.wait_bounds, lambda: one_of_wait("output_throughput_gap", wait(), TWO, SERVER), "no horizon"),
    *(
        (bounds.nested_wait_overflow, lambda make=make: bounds.nested_wait_overflow(*make(), 10.0), words)
        for make, words in NESTED
    ),
    *((bounds.nested_wait_bounds, lambda make=make: nested_bounds(*make()), words) for make, words in NESTED),
    (
        bounds.nested_wait_bounds,
        lambda: nested_bounds(nested(), TWO_ENDS, fs.Server(1000, TIME, max_batch_size=20)),
        "the limit is 20",
    ),
    (
        bounds.nested_wait_bounds,
        lambda: nested_bounds(nested(), TWO_ENDS, fs.Server(1000, TIME, token_budget=20)),
        "the budget is 20",
    ),
    (bounds.stability_conditions, lambda: condition("Nie", TWO, SERVER), "not d0 + d1·KV"),
    (
        bounds.stability_conditions,
        lambda: condition("Nie", TWO, fs.Server(math.inf, fs.IterationTime.paper(1.0, 0.1))),
        "KV capacity is infinite",
    ),
    (
        bounds.stability_conditions,
        lambda: condition("Nie", CACHED, fs.Server(100, fs.IterationTime.paper(1.0, 0.1))),
        "cached",
    ),
    (bounds.stability_conditions, lambda: condition("Li", TWO, SERVER), "KV capacity is finite"),
    (
        bounds.stability_conditions,
        lambda: condition("Li", TWO, fs.Server(math.inf, TIME, token_budget=8, max_batch_size=8)),
        "batch size is limited",
    ),
    (bounds.stability_conditions, lambda: condition("Dong", TWO, SERVER), "depends on the batch"),
    (
        bounds.stability_conditions,
        lambda: condition("Dong", TWO, fs.Server(50, UNIT.iteration_time, max_batch_size=8)),
        "batch size is limited",
    ),
    (
        bounds.stability_conditions,
        lambda: condition("Dong", TWO, fs.Server(math.inf, UNIT.iteration_time)),
        "KV capacity is infinite",
    ),
]
"""Functions that return bounds: what is asked outside the conditions, and what the answer has to name."""

CRITICAL = "threshold = 4"
RAISED: list[tuple[Callable[..., Any], Callable[[], Any], str]] = [
    (bounds.embedded_queue_mean, lambda: bounds.embedded_queue_mean(4, 4.0), CRITICAL),
    (bounds.embedded_queue_mean, lambda: bounds.embedded_queue_mean(4, 4.5, trials=10), CRITICAL),
    (bounds.embedded_queue_variance, lambda: bounds.embedded_queue_variance(4, 4.0), CRITICAL),
    (bounds.embedded_queue_pmf, lambda: bounds.embedded_queue_pmf(4, 4.0), CRITICAL),
    (bounds.embedded_queue_tail, lambda: bounds.embedded_queue_tail(4, 5.0, [1]), CRITICAL),
    (bounds.embedded_queue_transient, lambda: bounds.embedded_queue_transient(4, -1.0, 3), "mean_arrivals"),
    (bounds.fixed_cycle_ttft, lambda: bounds.fixed_cycle_ttft(4, 4.0, 1.0), CRITICAL),
    (bounds.slack_queue_bound, lambda: bounds.slack_queue_bound(4, 4.0), CRITICAL),
    (bounds.critical_queue_bound, lambda: bounds.critical_queue_bound(0, 10), "threshold"),
    (
        bounds.throughput_gap_bound,
        lambda: bounds.throughput_gap_bound([3.0], [math.inf], [2.0], [4], 10.0),
        "entry_queue",
    ),
    (bounds.lundberg_exponent, lambda: bounds.lundberg_exponent(10, 0.4, 4), "threshold must exceed"),
    (bounds.lundberg_buffer, lambda: bounds.lundberg_buffer(10, 0.4, 4, 100, 0.1), "threshold must exceed"),
    (bounds.exact_buffer, lambda: bounds.exact_buffer(10, 0.4, 4, 100, 0.1), "threshold must exceed"),
    (
        bounds.first_passage_probability,
        lambda: bounds.first_passage_probability(10, 0.4, 4, 9, 100),
        "threshold must exceed",
    ),
    (
        bounds.no_wait_floor,
        lambda: bounds.no_wait_floor(PATH, fs.Server(50, fs.IterationTime.affine(0.01, 1e-9, 1e-3, 0.0))),
        "recomputing",
    ),
    (bounds.hindsight_optimum, lambda: bounds.hindsight_optimum(PATH, SERVER), "be constant"),
    (
        bounds.hindsight_bound,
        lambda: bounds.hindsight_bound(PATH, fs.Server(50, UNIT.iteration_time, token_budget=9)),
        "token_budget",
    ),
]
"""Functions that return numbers or laws: outside their conditions they refuse, and name the condition."""


@pytest.mark.parametrize(("function", "ask", "violated"), RETURNED)
def test_outside_its_conditions_a_bound_names_the_violated_one(
    function: Callable[..., Any], ask: Callable[[], Bound], violated: str
) -> None:
    bound = ask()
    assert bound.value is None
    assert not bound.applies
    assert violated in bound.condition
    assert "not applicable" in repr(bound)


@pytest.mark.parametrize(("function", "ask", "violated"), RAISED)
def test_outside_its_conditions_a_number_is_refused(
    function: Callable[..., Any], ask: Callable[[], Any], violated: str
) -> None:
    with pytest.raises(InputError, match=re.escape(violated)):
        ask()


def test_among_many_exponents_those_of_unstable_queues_are_no_numbers() -> None:
    assert np.isnan(bounds.lundberg_exponents([0.3, 0.4, 0.5], [0.4, 0.4, 0.4])).tolist() == [
        False,
        True,
        True,
    ]


def test_inside_their_conditions_the_same_bounds_are_numbers() -> None:
    """The reasons above are the only thing wrong: with each put right there is a number."""
    assert all(bound.applies for bound in bounds.wait_bounds(wait(), TWO, SERVER, horizon=100.0))
    assert bounds.nested_wait_overflow(nested(), TWO_ENDS, SERVER, 10.0).applies
    assert condition("Nie", TWO, fs.Server(100, fs.IterationTime.paper(1.0, 0.1))).applies
    assert condition("Dong", TWO, UNIT).applies
    budget = fs.Server(math.inf, fs.IterationTime.affine(0.5, 0.01, 0.01, 0.0), token_budget=8)
    assert condition("Li", TWO, budget).applies
    assert bounds.hindsight_optimum(PATH, UNIT).to_bound().applies


def test_every_public_bound_is_asked_outside_its_conditions() -> None:
    """A function published later fails here until its conditions are tested too."""
    published = {name for name in bounds.__all__ if inspect.isfunction(getattr(bounds, name))}
    asked = {function.__name__ for function, _, _ in RETURNED + RAISED}
    assert published == asked | {bounds.lundberg_exponents.__name__}
