"""Figures: one function a picture, each taking `ax=None` and returning the Axes it drew on.

Made for one column of a page, `COLUMN` = 3.4 inches wide. Colours are the Okabe-Ito set, told apart by readers
with any common colour vision; lines also differ by their dashes, so a figure survives a grey print. Units stand on
every axis. Global Matplotlib settings are left alone: the style applies inside `matplotlib.rc_context` while a
figure is made.
"""

from fluidsched.plots.fleets import capacity_curve, fleet_checks, routing
from fluidsched.plots.frame import COLOURS, COLUMN, LINES, style
from fluidsched.plots.program import (
    admitted_rates,
    fair_curve,
    fair_shares,
    rate_sweep,
    stability_boundary,
    transient,
)
from fluidsched.plots.queues import queue_law
from fluidsched.plots.runs import (
    estimates,
    gains,
    kv_occupancy,
    latency_distribution,
    load_curve,
    policy_timeline,
    throughput_latency,
    trajectory,
)
from fluidsched.plots.servers import calibration
from fluidsched.plots.tables import reach_curve, segment_curve, thresholds, wait_curve
from fluidsched.plots.workloads import arrivals, request_types

__all__ = [
    "COLOURS",
    "COLUMN",
    "LINES",
    "admitted_rates",
    "arrivals",
    "calibration",
    "capacity_curve",
    "estimates",
    "fair_curve",
    "fair_shares",
    "fleet_checks",
    "gains",
    "kv_occupancy",
    "latency_distribution",
    "load_curve",
    "policy_timeline",
    "queue_law",
    "rate_sweep",
    "reach_curve",
    "request_types",
    "routing",
    "segment_curve",
    "stability_boundary",
    "style",
    "thresholds",
    "throughput_latency",
    "trajectory",
    "transient",
    "wait_curve",
]
