"""Exact queues behind the certificates: pure functions of numbers, no objects of the pipeline.

`embedded`: the queue of a threshold rule, looked at once per cycle.
"""

from fluidsched.queues.embedded import embedded_queue_mean, embedded_queue_variance

__all__ = ["embedded_queue_mean", "embedded_queue_variance"]
