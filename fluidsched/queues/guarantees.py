r"""What the theory of WAIT promises, with its constants: queue, throughput gap, TTFT and latency.

**Setting.** A type arrives at rate λ; a cycle lasts at most T; a cycle admits n requests of the type if n
wait, none otherwise; m = λT requests arrive per cycle in the mean. The entry queue after decisions is
dominated by the embedded queue W of `embedded`, which starts cycles every T seconds whatever happens.

**Queue.** W never exceeds the plain queue V' = max(V + X − n, 0) by more than n − 1 (induction over a cycle).
By Spitzer's identity E[V_b] = Σ_{k≤b} E[S_k⁺]/k with S_k = X_1 + … + X_k − kn, and by Kingman's bound
E[V] ≤ m/(2(n − m)) in the limit. Where m ≤ n, E[S_k⁺] ≤ √(kn)/2. The published constants follow, rounded up:

    m = n:   E[W_b] ≤ n + √n Σ_{k≤b} k^{−1/2}              (grows like 2√(nb))
    m < n:   E[W]   ≤ 2n + (m + (n − m)²)/(2(n − m)).

**Throughput gap.** After H seconds, what a type has brought and not completed is in its entry queue, in the
arrivals of the cycle in progress, or in service (at most n per stage). Counted in output tokens, per second,

    gap ≤ (1/H) Σ_j o_j ( E[W_j] + λ_j T + (o_j + 1) n_j ).

**Fixed cycles: TTFT exactly.** If cycles do start every T seconds, the queue at a random instant is W plus
the arrivals of an elapsed time uniform on (0, T), in the mean E[W] + λT/2. By Little's law the mean time to
admission is E[W]/λ + T/2; the first token follows when the admitting iteration ends. For the rule that
waits this contains (n − 1)/(2λ) seconds of waiting for company.

**Literal WAIT, one type.** It starts its i-th batch at σ_i = max(σ_{i−1} + T, t_i), t_i the arrival of the
batch's last request; fixed cycles start it at the first tick not before that. So σ_i is never later, the
queue is never longer at any instant, and the fixed-cycle TTFT is an upper bound. The mean time between
starts is n/λ, so a request that needs s cycles finishes (s − 1) n/λ + T after its start in the mean.

**Literal WAIT, several types.** A batch complete at t_i starts at the next decision, at most T later:
s_i ≤ max(s_{i−1}, t_i) + T. By induction s_i ≤ σ_i + T, so one more T covers the other types.

**Sources.** Queue and gap bounds: Ao, Luo, Simchi-Levi, Wang, arXiv 2504.11320, Theorem 1 and its proof;
the delay bounds are derived here.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fluidsched._checks import check_count, check_real
from fluidsched.errors import InputError
from fluidsched.queues.embedded import embedded_queue_mean

__all__ = ["critical_queue_bound", "fixed_cycle_ttft", "slack_queue_bound", "throughput_gap_bound"]

_ZETA_HALF = -1.4603545088095868  # Riemann's zeta at 1/2
_EXACT_TERMS = 64  # of Σ k^{−1/2}; beyond them Euler–Maclaurin is exact to rounding


def critical_queue_bound(threshold: int, cycles: int) -> float:
    """Bound n + √n Σ_{k≤b} k^{−1/2} on the mean entry queue after b cycles from empty, for m ≤ n.

    Parameters
    ----------
    threshold : int
        n.
    cycles : int
        b.

    Returns
    -------
    float
        Requests.

    Examples
    --------
    >>> critical_queue_bound(4, 1)
    6.0
    >>> round(critical_queue_bound(4, 10**12) / 10**6, 5)       # about 2√(nb)
    4.0
    """
    n = check_count("threshold", threshold, minimum=1)
    b = check_count("cycles", cycles)
    if b <= _EXACT_TERMS:
        total = math.fsum(1.0 / math.sqrt(k) for k in range(1, b + 1))
    else:
        root = math.sqrt(b)
        total = (
            2.0 * root + _ZETA_HALF + 1.0 / (2.0 * root) - 1.0 / (24.0 * root**3) + 1.0 / (384.0 * root**7)
        )
    return n + math.sqrt(n) * total


def slack_queue_bound(threshold: int, mean_arrivals: float) -> float:
    """Bound 2n + (m + (n − m)²)/(2(n − m)) on the stationary mean entry queue, for m < n.

    Parameters
    ----------
    threshold : int
        n.
    mean_arrivals : float
        m ≥ 0, mean arrivals per cycle.

    Returns
    -------
    float
        Requests; `embedded_queue_mean` is the exact value it bounds.

    Examples
    --------
    >>> round(slack_queue_bound(4, 3.6), 6), round(embedded_queue_mean(4, 3.6), 6)
    (12.7, 5.099877)
    """
    n = check_count("threshold", threshold, minimum=1)
    m = check_real("mean_arrivals", mean_arrivals, minimum=0.0)
    if m >= n:
        raise InputError(
            "mean_arrivals", m, f"be below threshold = {n:,}", "Use critical_queue_bound at equality."
        )
    return 2.0 * n + (m + (n - m) ** 2) / (2.0 * (n - m))


def throughput_gap_bound(
    output_tokens: npt.ArrayLike,
    entry_queue: npt.ArrayLike,
    mean_arrivals: npt.ArrayLike,
    threshold: npt.ArrayLike,
    horizon: float,
) -> float:
    """Bound on the output tokens per second lost to the fluid model over a horizon.

    Parameters
    ----------
    output_tokens : array_like (J,)
        o_j.
    entry_queue : array_like (J,)
        E[W_j] or a bound on it, requests.
    mean_arrivals : array_like (J,)
        λ_j T, requests per cycle.
    threshold : array_like (J,)
        n_j.
    horizon : float
        H > 0, seconds.

    Returns
    -------
    float
        Tokens per second.

    Examples
    --------
    >>> throughput_gap_bound([10], [5.0], [3.0], [4], horizon=100.0)
    5.2
    """
    arrays = {
        "output_tokens": output_tokens,
        "entry_queue": entry_queue,
        "mean_arrivals": mean_arrivals,
        "threshold": threshold,
    }
    checked = {}
    for name, value in arrays.items():
        array = np.asarray(value, dtype=np.float64)
        if array.ndim != 1 or not np.all(np.isfinite(array)) or np.any(array < 0.0):
            raise InputError(name, value, "be a list of finite non-negative numbers, one per type")
        checked[name] = array
    if len({len(a) for a in checked.values()}) != 1:
        received = ", ".join(f"{name}: {len(a)}" for name, a in checked.items())
        raise InputError("output_tokens", f"lengths {received}", "have one entry per type, like the others")
    o, w, m, n = checked.values()
    return float(np.sum(o * (w + m + (o + 1.0) * n))) / check_real("horizon", horizon, above=0.0)


def fixed_cycle_ttft(
    threshold: int,
    arrival_rate: float,
    cycle_time: float,
    first_iteration_time: float | None = None,
    wait: bool = True,
) -> float:
    """Mean TTFT when cycles start every `cycle_time` seconds; an upper bound for WAIT with one type.

    Parameters
    ----------
    threshold : int
        n, requests admitted at once.
    arrival_rate : float
        λ > 0, Poisson, requests per second; λT < n.
    cycle_time : float
        T > 0, seconds.
    first_iteration_time : float, optional
        Seconds from the start of a cycle to the first tokens of those it admits; T if not given (cycles of
        one iteration).
    wait : bool
        Whether a cycle waits for a full threshold; False admits up to n in every cycle.

    Returns
    -------
    float
        Seconds: E[W]/λ + T/2 + first_iteration_time.

    Examples
    --------
    >>> round(fixed_cycle_ttft(4, arrival_rate=3.6, cycle_time=1.0), 4)
    2.9166
    """
    rate = check_real("arrival_rate", arrival_rate, above=0.0)
    cycle = check_real("cycle_time", cycle_time, above=0.0)
    first = cycle
    if first_iteration_time is not None:
        first = check_real("first_iteration_time", first_iteration_time, minimum=0.0)
    return embedded_queue_mean(threshold, rate * cycle, wait=wait) / rate + cycle / 2.0 + first
