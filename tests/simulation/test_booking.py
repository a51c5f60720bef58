"""Booking limits by hand, and what they refuse; the published schedules are in `test_published_runs`."""

from __future__ import annotations

import math

import pytest
from numpy.testing import assert_array_equal
from simulation_cases import path_of, server_of

from fluidsched.errors import InputError, SimulationError
from fluidsched.simulation import booking_limit, nested_booking_limit, simulate
from fluidsched.simulation.reference import run_reference

nan = math.nan


def run_rule(path, rule):
    batches = []
    run = run_reference(
        path,
        server_of(),
        rule,
        horizon=None,
        on_iteration=lambda b: batches.append(({i for i, _ in b.prefill}, set(b.decode))),
    )
    return run, batches


def test_a_full_type_opens_the_gate():
    """4 and 8 of 12 places, 2 started at a time: when 8 long ones are in service, they run without newcomers."""
    path = path_of(*[(0.0, 2, 3)] * 9)
    run, batches = run_rule(path, booking_limit(12, {1: 2.0, 3: 2.0}))
    started = [{0, 1}, {2, 3}, {4, 5}, {6, 7}]
    assert [prefills for prefills, _ in batches] == started
    assert_array_equal(run.finish_s[:4], [3.0, 3.0, 4.0, 4.0])
    assert run.verdict == "stuck"  # one waits, and two must


def test_places_are_not_exceeded():
    """Two places, one started at a time: the third enters when the first has left; then the gate stays shut."""
    run, batches = run_rule(path_of(*[(0.0, 2, 3)] * 3), booking_limit(2, {3: 1.0}))
    assert [len(prefills) + len(decodes) for prefills, decodes in batches] == [1, 2, 2, 2]
    assert_array_equal(run.admitted_s, [0.0, 1.0, 3.0])


def test_nested_segments_open_in_order():
    """Lengths 1 and 3, 10 places: 5 at stage 0; the second segment (limit 3 per stage, 5 in all) needs 3.

    At 1 s five newcomers open the first segment and three of those at stage 1 go on, the oldest; at 2 s five
    more do, and of the 2 + 5 at stage 1 only 5 - 3 places are left besides the three at stage 2.
    """
    path = path_of(*[(0.0, 2, 3)] * 5, *[(1.0, 2, 3)] * 5, *[(2.0, 2, 3)] * 5)
    run, batches = run_rule(path, nested_booking_limit(10, {1: 1.0, 3: 1.0}))
    assert batches == [
        ({0, 1, 2, 3, 4}, set()),
        ({5, 6, 7, 8, 9}, {0, 1, 2}),
        ({10, 11, 12, 13, 14}, {3, 4, 0, 1, 2}),
    ]
    assert_array_equal(run.finish_s, [3.0, 3.0, 3.0] + [nan] * 12)
    assert run.verdict == "stuck"


@pytest.mark.parametrize("rule", [booking_limit, nested_booking_limit])
def test_what_is_refused(rule):
    for places, rates, what in [
        (0, {3: 1.0}, "places"),
        (5, {}, "arrival_rate"),
        (5, {3: 0.0}, r"arrival_rate\[3\]"),
        (5, {0: 1.0}, "length of arrival_rate"),
    ]:
        with pytest.raises(InputError, match=what):
            rule(places, rates)
    with pytest.raises(SimulationError, match="no rate for request 1 of 7 output tokens"):
        simulate(path_of((0.0, 2, 3), (0.0, 2, 7)), server_of(), rule(2, {3: 1.0}), engine="reference")
