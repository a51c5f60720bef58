"""Bounds to compare a policy with, each with its formula, source and conditions.

`Bound`: a number, or the reason why there is none. `wait_bounds`, `nested_wait_bounds`, `nested_wait_overflow`: the
theorem constants of a table. `no_wait_floor`: what no scheduler can beat, per request. `stability_conditions`: rates
from the literature. `hindsight_optimum`, `hindsight_bound`: the least total latency of a finite
path. The exact queues of `fluidsched.queues` are published here too.
"""

from fluidsched.bounds.bound import Bound
from fluidsched.bounds.floor import NoWaitFloor, no_wait_floor
from fluidsched.bounds.hindsight import Hindsight, hindsight_bound, hindsight_optimum
from fluidsched.bounds.stability import stability_conditions
from fluidsched.bounds.theorems import nested_wait_bounds, nested_wait_overflow, wait_bounds
from fluidsched.queues import (
    QueueMoments,
    critical_queue_bound,
    embedded_queue_mean,
    embedded_queue_pmf,
    embedded_queue_tail,
    embedded_queue_transient,
    embedded_queue_variance,
    exact_buffer,
    first_passage_probability,
    fixed_cycle_ttft,
    lundberg_buffer,
    lundberg_exponent,
    lundberg_exponents,
    slack_queue_bound,
    throughput_gap_bound,
)

__all__ = [
    "Bound",
    "Hindsight",
    "NoWaitFloor",
    "QueueMoments",
    "critical_queue_bound",
    "embedded_queue_mean",
    "embedded_queue_pmf",
    "embedded_queue_tail",
    "embedded_queue_transient",
    "embedded_queue_variance",
    "exact_buffer",
    "first_passage_probability",
    "fixed_cycle_ttft",
    "hindsight_bound",
    "hindsight_optimum",
    "lundberg_buffer",
    "lundberg_exponent",
    "lundberg_exponents",
    "nested_wait_bounds",
    "nested_wait_overflow",
    "no_wait_floor",
    "slack_queue_bound",
    "stability_conditions",
    "throughput_gap_bound",
    "wait_bounds",
]
