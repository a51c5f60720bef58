"""Bounds to compare a policy with."""

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
    slack_queue_bound,
    throughput_gap_bound,
)

__all__ = [
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
    "lundberg_buffer",
    "lundberg_exponent",
    "slack_queue_bound",
    "throughput_gap_bound",
]
