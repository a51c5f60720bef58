"""Demand that varies in time: the multi-period fluid program.

Time is cut into T periods of h seconds, each much longer than a request's lifetime, so that within a period
the server is in the equilibrium of `fluidsched.fluid.model`. N_t replicas serve in period t; U_t is the
number of iterations per second of all of them together. Type j arrives at λ_{j,t}, is admitted at a_{j,t},
and what is not admitted waits in the backlog q_j:

    q_{j,t+1} = q_{j,t} + h ( λ_{j,t} − a_{j,t} ) ≥ 0                          balance; q_{j,0} is given
    c_i U_t + Σ_j w_j^(i) a_{j,t} ≤ N_t          for every affine piece i      time
    Σ_j (use of r)_j a_{j,t} ≤ K_r U_t           kv, batch, tokens
    U_t ≥ N_t/T_max                              mean iteration time
    low_t ≤ N_t ≤ high_t                         replicas
    −h·ramp_down ≤ N_t − N_{t−1} ≤ h·ramp_up     ramps

No a ≤ λ: an admission from the backlog may exceed the period's arrivals. The backlog is linear within a
period, so holding cost g_j per request and second is integrated exactly by trapezoids; with reward r_j per
admitted request and cost b per replica and second the program is

    min   Σ_{t,j} g_j h (q_{j,t} + q_{j,t+1})/2 − Σ_{t,j} h r_j a_{j,t} + Σ_t h b N_t.

Nothing is ever refused for good: a reward only prices what is left at the end. With constant demand from an
empty start and holding costs alone every backlog is smallest at every instant when a_t solves the
one-period program with rewards g, and with rewards alone the best mean admission is the one-period optimum.

The program is assembled as arrays (no loop over periods) in scaled columns: rates in units of what a type
can use, backlogs in these units times h, U in units of the largest N/T(empty batch); balance rows then have
coefficients ±1 and resource rows coefficients that are loads.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched._checks import check_real
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.fluid._assembly import Assembly
from fluidsched.fluid.demand import demand_rates
from fluidsched.fluid.model import TOLERANCE, FluidModel, build_model
from fluidsched.fluid.transient_solution import TransientModel, TransientSolution
from fluidsched.server import Server
from fluidsched.workload import ArrivalPath, Workload

__all__ = ["solve_transient"]


def solve_transient(
    workload: Workload,
    server: Server,
    demand: ArrayLike | ArrivalPath,
    *,
    step: float,
    holding_cost: ArrayLike = 1.0,
    reward: str | ArrayLike = 0.0,
    initial_backlog: ArrayLike = 0.0,
    replicas: ArrayLike = 1.0,
    min_replicas: ArrayLike | None = None,
    replica_cost: float = 0.0,
    ramp_up: float = math.inf,
    ramp_down: float = math.inf,
    initial_replicas: float | None = None,
    max_iteration_time: float | None = None,
    chunk_tokens: int | None = None,
) -> TransientSolution:
    """Plan admissions, and replicas where they may vary, against demand that varies in time.

    Parameters
    ----------
    workload : Workload
        J request types.
    server : Server
        One replica, with a piecewise-affine iteration time.
    demand : array_like of shape (T, J) or (T,), or ArrivalPath
        Offered rates per period and type, req/s; or total rates in the workload's mix; or requests to be
        counted. See `fluidsched.fluid.demand`.
    step : float
        Length h of a period, s: much longer than a request's lifetime, or the model does not apply.
    holding_cost : float or array_like of shape (J,)
        g_j, cost of one waiting request per second. The default makes the cost request-seconds of waiting.
    reward : {"requests", "output_tokens", "total_tokens"}, float or array_like of shape (J,)
        r_j of an admitted request; what is still waiting at the end has earned none.
    initial_backlog : float or array_like of shape (J,)
        q_{j,0}, requests waiting at the start.
    replicas : float or array_like of shape (T,)
        Replicas of the server, or, with `min_replicas`, the most there may be. Real numbers.
    min_replicas : float or array_like of shape (T,), optional
        Fewest replicas; given, the number N_t in each period is chosen.
    replica_cost : float
        b, cost of one replica per second.
    ramp_up, ramp_down : float
        Largest growth and fall of N, replicas per second; inf for no limit.
    initial_replicas : float, optional
        N before the first period, from which the ramps count; by default the first period starts freely.
    max_iteration_time : float, optional
        Upper limit on the mean iteration time, s.
    chunk_tokens : int, optional
        Chunk of prefills, tokens; whole prompts by default.

    Returns
    -------
    TransientSolution
        Admissions (T, J), backlogs (T+1, J), replicas (T,), prices and a certificate.

    Raises
    ------
    InputError
        If an argument is wrong.
    InfeasibleError
        If no number of replicas keeps the ramps and the limits (the message names the period), or
        `max_iteration_time` does not exceed the empty iteration's.
    SolverError
        If HiGHS fails.

    Examples
    --------
    One type needs 0.25 s of a server each, so 4 req/s are served; 6 req/s come for a minute, then 2:

    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 1.0, prompt_tokens=100, output_tokens=1)])
    >>> server = fs.Server(float("inf"), fs.IterationTime.affine(1e-6, 2.5e-3, 0.0, 0.0))
    >>> solution = fs.solve_transient(workload, server, [6.0, 2.0, 2.0], step=60.0)
    >>> solution.backlog[:, 0].round(3).tolist(), round(solution.cost, 3)
    ([0.0, 120.0, 0.0, 0.0], 7200.0)
    """
    h = check_real("step", step, above=0.0)
    model = build_model(
        workload, server, reward, max_iteration_time=max_iteration_time, chunk_tokens=chunk_tokens
    )
    rate = demand_rates(demand, workload, h)
    high = _per_period("replicas", replicas, len(rate))
    low = high if min_replicas is None else _per_period("min_replicas", min_replicas, len(rate))
    if (low > high).any():
        period = int(np.argmax(low > high))
        raise InputError(
            f"min_replicas in period {period}", float(low[period]), f"be at most replicas, {high[period]:g}"
        )
    if high.max() <= 0.0:
        raise InputError("replicas", 0.0, "be positive in some period")
    problem = TransientModel(
        model=model,
        step=h,
        arrival_rate=rate,
        initial_backlog=_per_type("initial_backlog", initial_backlog, workload),
        holding_cost=_per_type("holding_cost", holding_cost, workload),
        min_replicas=low,
        max_replicas=high,
        replica_cost=check_real("replica_cost", replica_cost, minimum=0.0),
        ramp_up=check_real("ramp_up", ramp_up, minimum=0.0, allow_inf=True),
        ramp_down=check_real("ramp_down", ramp_down, minimum=0.0, allow_inf=True),
        initial_replicas=None
        if initial_replicas is None
        else check_real("initial_replicas", initial_replicas, minimum=0.0),
    )
    _check_ramps(problem)
    return _solve(problem)


def _check_ramps(problem: TransientModel) -> None:
    """Raise if no N keeps ramps and limits: the reachable numbers are an interval, followed period by period."""
    up, down = problem.step * problem.ramp_up, problem.step * problem.ramp_down
    if problem.initial_replicas is None:
        least, most = -math.inf, math.inf
    else:
        least = most = problem.initial_replicas
    pairs = zip(problem.min_replicas.tolist(), problem.max_replicas.tolist(), strict=True)
    for period, (low, high) in enumerate(pairs):
        before, allowed = (least, most), f"[{low:g}, {high:g}] replicas are allowed in period {period}"
        least, most = max(low, least - down), min(high, most + up)
        if least > most * (1.0 + TOLERANCE):
            rising = before[1] + up < low
            name, limit = ("ramp_up", problem.ramp_up) if rising else ("ramp_down", problem.ramp_down)
            missing = low - before[1] if rising else before[0] - high
            raise InfeasibleError(
                f"{allowed}, but the period before it can hold {'at most' if rising else 'no fewer than'}"
                f" {before[1] if rising else before[0]:g} and {name} = {limit:g} replicas/s changes that by"
                f" {limit * problem.step:g}. Raise {name} to {missing / problem.step:g} or widen the limits of"
                f" the period.",
                name,
            )


def _solve(problem: TransientModel) -> TransientSolution:
    model, h, periods = problem.model, problem.step, problem.periods
    types, rows, names = len(model.workload), len(model.row_names), model.workload.type_names
    most = float(problem.max_replicas.max())
    fastest = 1.0 / float(model.base.max())
    demand = np.maximum(problem.arrival_rate.max(axis=0), problem.initial_backlog / h)
    able = model.rate_alone * most
    unit = np.where(demand > 0.0, np.minimum(demand, able), able)

    lp = Assembly()
    a = lp.columns(periods * types, 0.0, np.inf, np.tile(-h * model.reward * unit, periods))
    weight = np.repeat([h, h / 2], [periods - 1, 1])[:, None] * problem.holding_cost
    q = lp.columns(periods * types, 0.0, np.inf, (weight * unit * h).ravel())
    u = lp.columns(periods, 0.0, np.inf, np.zeros(periods))
    n = lp.columns(
        periods,
        problem.min_replicas / most,
        problem.max_replicas / most,
        np.full(periods, h * problem.replica_cost * most),
    )

    arriving = problem.arrival_rate / unit
    arriving[0] += problem.initial_backlog / (h * unit)
    balance = lp.rows(
        arriving.ravel(), arriving.ravel(), lambda i: f"balance of {names[i % types]} in period {i // types}"
    )
    lp.add(balance, a, 1.0)
    lp.add(balance, q, 1.0)
    lp.add(balance[types:], q[:-types], -1.0)

    row_scale = np.where(model.limit > 0.0, 1.0, -model.rate_coefficient * fastest)
    resource = lp.rows(
        np.full(periods * rows, -np.inf),
        np.zeros(periods * rows),
        lambda i: f"{model.row_names[i % rows]} in period {i // rows}",
    ).reshape(periods, rows)
    use = model.matrix * unit / (row_scale[:, None] * most)
    by_type = a.reshape(periods, 1, types)
    lp.add(*np.broadcast_arrays(resource[:, :, None], by_type, use))
    lp.add(*np.broadcast_arrays(resource, u[:, None], model.rate_coefficient * fastest / row_scale))
    lp.add(*np.broadcast_arrays(resource[:, : model.pieces], n[:, None], -1.0))
    if math.isfinite(model.max_iteration_time):
        speed = lp.rows(
            np.full(periods, -np.inf), np.zeros(periods), lambda i: f"iteration_time in period {i}"
        )
        lp.add(speed, n, 1.0 / (model.max_iteration_time * fastest))
        lp.add(speed, u, -1.0)
    fall, rise = problem.ramp_limits
    ramp = lp.rows(fall / most, rise / most, lambda i: f"ramps into period {i}")
    lp.add(ramp, n, 1.0)
    lp.add(ramp[1:], n[:-1], -1.0)

    value, dual, cost_scale, effort, _, _ = lp.minimise("the multi-period program")
    admitted, backlog = _balanced(problem, value[a].reshape(periods, types) * unit)
    replicas = np.clip(value[n] * most, problem.min_replicas, problem.max_replicas)
    row_dual = np.maximum(-dual[resource], 0.0) * cost_scale / (h * row_scale * most)
    return TransientSolution(
        problem=problem,
        admitted_rate=admitted,
        backlog=backlog,
        replicas=replicas,
        iteration_rate=_iteration_rate(model, admitted, replicas),
        row_dual=row_dual,
        ramp_dual=-dual[ramp] * cost_scale / most,
        effort=effort,
    )


def _balanced(
    problem: TransientModel, admitted: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return admissions and backlogs that balance to rounding: nobody is admitted before arriving."""
    admitted = np.maximum(admitted, 0.0)
    backlog = np.empty((problem.periods + 1, admitted.shape[1]))
    backlog[0] = problem.initial_backlog
    for period in range(problem.periods):
        present = backlog[period] + problem.step * problem.arrival_rate[period]
        left = present - problem.step * admitted[period]
        emptied = left <= TOLERANCE * 1e-3 * present
        backlog[period + 1] = np.where(emptied, 0.0, left)
        admitted[period] = np.where(emptied, present / problem.step, admitted[period])
    return admitted, backlog


def _iteration_rate(
    model: FluidModel, admitted: NDArray[np.float64], replicas: NDArray[np.float64]
) -> NDArray[np.float64]:
    """U_t, the largest the time rows allow: no replica idles between iterations."""
    positive = model.base > 0.0
    busy = admitted @ model.matrix[: model.pieces][positive].T
    largest = ((replicas[:, None] - busy) / model.base[positive]).min(axis=1)
    return np.asarray(np.maximum(largest, 0.0))


def _per_type(argument: str, given: ArrayLike, workload: Workload) -> NDArray[np.float64]:
    labels = [f"type {name!r}" for name in workload.type_names]
    return _numbers(argument, given, labels, "type")


def _per_period(argument: str, given: ArrayLike, periods: int) -> NDArray[np.float64]:
    return _numbers(argument, given, [f"period {t}" for t in range(periods)], "period")


def _numbers(argument: str, given: ArrayLike, labels: list[str], each: str) -> NDArray[np.float64]:
    try:
        array = np.array(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(argument, given, f"be a number, or one per {each}") from None
    if array.ndim == 0:
        check_real(argument, float(array), minimum=0.0)
        return np.full(len(labels), array)
    if array.shape != (len(labels),):
        raise InputError(argument, f"shape {array.shape}", f"have one number per {each}, {len(labels)}")
    for label, value in zip(labels, array.tolist(), strict=True):
        check_real(f"{argument} of {label}", value, minimum=0.0)
    return array
