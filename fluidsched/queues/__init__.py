"""Exact queues behind the certificates: pure functions of numbers, no objects of the pipeline.

`embedded`: the queue of a threshold rule, looked at once per cycle. `lundberg` and `first_passage`: how far
a boundary queue of Nested WAIT climbs, bounded and exactly. `guarantees`: the theorem constants and mean
delays.
"""

from fluidsched.queues.embedded import (
    QueueMoments,
    embedded_queue_mean,
    embedded_queue_means,
    embedded_queue_pmf,
    embedded_queue_tail,
    embedded_queue_transient,
    embedded_queue_variance,
)
from fluidsched.queues.first_passage import exact_buffer, first_passage_probability
from fluidsched.queues.guarantees import (
    critical_queue_bound,
    fixed_cycle_ttft,
    slack_queue_bound,
    throughput_gap_bound,
)
from fluidsched.queues.lundberg import lundberg_buffer, lundberg_exponent, lundberg_exponents

__all__ = [
    "QueueMoments",
    "critical_queue_bound",
    "embedded_queue_mean",
    "embedded_queue_means",
    "embedded_queue_pmf",
    "embedded_queue_tail",
    "embedded_queue_transient",
    "embedded_queue_variance",
    "exact_buffer",
    "first_passage_probability",
    "fixed_cycle_ttft",
    "lundberg_buffer",
    "lundberg_exponent",
    "lundberg_exponents",
    "slack_queue_bound",
    "throughput_gap_bound",
]
