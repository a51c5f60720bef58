"""Bounds to compare a policy with."""

from fluidsched.queues import embedded_queue_mean, embedded_queue_variance

__all__ = ["embedded_queue_mean", "embedded_queue_variance"]
