r"""From a fluid solution to a policy table with its certificate.

The solution says how fast each type may be admitted (a_j) for the server to keep up in the mean. A table
adds what makes that true at every moment: limits on how many are let in at a time, such that memory holds
them, and slack, such that queues stay short. `fluidsched.policy.capped`, `.wait` and `.gated` derive them;
each table's certificate states what it guarantees, entry by entry: value, unit, formula, and whether it is
"certain" (on every path), holds with "probability" 1 − δ by the tail of the actual law, by "approximation" (the normal
law in its place), or in "expectation" (long-run means).

Types that the optimum refuses (a_j = 0, in overload) get threshold 0: they are never admitted. Types it
rations (a_j < λ_j) are admitted at a_j; as long as all their demand is offered their queue grows. Thin the
path by `fluid.admitted_fraction` to see the admitted stream alone; the certificate's queue and TTFT are
those of that stream. Where the optimum rations, it lies on the boundary and leaves no slack: ``admitted_share``
compiles for a little less, and the rows state the rates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_choice, check_real
from fluidsched._display import Tabular
from fluidsched.errors import InputError
from fluidsched.policy import capped, gated, lookahead, nested_wait, wait
from fluidsched.policy.problem import (
    SHARE_TOLERANCE,
    Problem,
    Slack,
    boundary_problem,
    check_slack,
    entry,
    largest_share,
    least_severe,
    predictor_of,
    provenance_of,
    rows_of,
)
from fluidsched.policy.table import PolicyTable, TableType
from fluidsched.policy.tails import sized
from fluidsched.workload import Workload

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from fluidsched.fluid import FluidSolution
    from fluidsched.server import Server
    from fluidsched.workload.predictions import Prediction

__all__ = ["ReachCurve", "compile_policy", "largest_load", "reach_curve"]

TYPED_KINDS = ("capped", "wait", "gated")  # those whose reach against the number of types is of interest
COMPILED_KINDS = (*TYPED_KINDS, "nested-wait")
INSIDE_SLACK = 0.02  # of tables in overload, where the optimum leaves none
TOKEN_BUDGET = 2048  # tokens per iteration of capped and gated tables, as vLLM's default


def compile_policy(
    fluid: FluidSolution,
    kind: str,
    *,
    slack: Slack = "auto",
    overflow_probability: float = 0.01,
    block_iterations: int | None = None,
    horizon: float | None = None,
    kv_reserve: float = 0.0,
    rate_error: float | Sequence[float] = 0.0,
    error_budget: float | None = None,
    segments: Sequence[int] | str | None = None,
    segment_count: int | None = None,
    buffer: str | None = None,
    mode: str | None = None,
    prediction: Prediction | None = None,
    admitted_share: float | str = 1.0,
) -> PolicyTable:
    """Compile a fluid solution into a policy table of the given kind.

    Parameters
    ----------
    fluid : FluidSolution
        What to admit, and the workload and server it was solved for.
    kind : {"capped", "wait", "gated", "nested-wait", "lookahead"}
        "capped": a cap on the requests in service, no types. "wait": WAIT in blocks of iterations.
        "gated": at most n_j requests of type j in any k_j consecutive iterations. "nested-wait": WAIT over
        segments of iterations done, which looks neither at types nor at output lengths. "lookahead": the rule of
        `baselines.vllm` that admits only if what is forecast to be held later fits too (`fluidsched.policy.lookahead`).
    slack : "auto" or float
        ε: the table keeps up with 1 + ε times the admitted rates. "auto": the largest ε at which a table
        exists, for each block length (to within 1e-6 of 1 + ε, by bisection: a table that exists at one ε
        exists at every smaller one); "capped", whose cap depends on memory alone, just has to carry the
        admitted rates.
    overflow_probability : float
        δ in [0, 1/2]: memory holds with probability 1 − δ at each iteration where lengths are random, by the tail of
        the actual law, which the certificate states beside the worst case. 0:
        every request is taken as long as its type allows, and memory holds with certainty. "nested-wait":
        positive, the probability that memory overflows at any time within the horizon.
    block_iterations : int, optional
        Iterations per block of "wait" and "nested-wait", window of "gated". None: chosen by the compiler.
    horizon : float, optional
        Seconds; "wait" then also states its throughput over that time from an empty start; "nested-wait": how
        long memory has to hold, by default an hour.
    kv_reserve : float
        Tokens of the KV capacity the table leaves free, for what the model does not know: a drifting mix,
        lengths correlated in time. Memory bounds are then those of the rest.
    rate_error : float or sequence of float
        Relative error d in [0, 1) that the rates may have, one for all types or one each, (J,): the table keeps
        up with all rates a_j (1 + e_j), |e_j| ≤ d_j (`fluidsched.policy.robust`). The certificate's "robust"
        line states the price: the share of the largest certified load that is given up for it.
    error_budget : float, optional
        Γ: only so many types are off by as much at once, Σ |e_j| / d_j ≤ Γ. None: any number.
    segments : sequence of int, "optimal" or "quantiles", optional
        "nested-wait" only: the boundaries r_1 < … < r_L in iterations done, the last one at least the longest
        output's o − 1; or cuts of least memory (default); or cuts that equal shares of the requests end between.
    segment_count : int, optional
        "nested-wait" only: L. None with "optimal": the number that needs least memory.
    buffer : {"exact", "lundberg"}, optional
        "nested-wait" only: exact first-passage buffers (default) or the exponential bound. Where that bound is above
        512 requests it is taken instead of the exact one: the certificate's "buffer" says which, for each segment.
    mode : {"law", "known", "reserve"}, optional
        "lookahead" only: forecasts by the law of outputs (default), by each request's own length, or R tokens per
        request, with R the quantile of outputs that one exceeds with probability δ.
    prediction : Prediction, optional
        "lookahead" with mode "known" only: how the path's predictions err; the table then believes them. None:
        lengths are taken as true, and no headroom is kept.
    admitted_share : float or "auto"
        The table is compiled for this share, in (0, 1], of the solution's admitted rates. In overload the optimum lies
        on the boundary, where no table has slack: "auto" goes as little inside as a table with a slack of 0.02 (or the
        `slack` given, if a number) needs, to 0.001. The certificate's "admitted_share" and the rows state it; thin the
        path by the rows' admitted over arrival rates for the stream that is meant. Not for "lookahead".

    Returns
    -------
    PolicyTable
        With certificate and provenance.

    Raises
    ------
    InfeasibleError
        No such table exists. `reason` is "time" (the server is too slow), "memory", "rounding" (it exists
        for thresholds that need not be whole), "batch" (the largest batch is too small) or "tokens" (a
        token budget is), or "segments" (no whole thresholds keep the boundary queues of the segments asked for
        stable); the message says up to which share of the fluid boundary one exists.
    InputError
        An argument is out of range, the iteration time is no maximum of affine pieces, or δ = 0 where a
        type's lengths have no upper bound.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 24.0, prompt_tokens=512, output_tokens=21)])
    >>> server = fs.Server(137_000, fs.IterationTime.paper(d0=0.010042382503853812, d1=3.342175435455382e-7))
    >>> table = compile_policy(fs.solve_fluid(workload, server), "wait", slack=0.1, block_iterations=1)
    >>> table.thresholds
    array([1])
    >>> table.certificate["memory"]["value"]
    10962.0
    """
    kinds = (*COMPILED_KINDS, "lookahead")
    if kind not in kinds:
        raise InputError(
            "kind",
            kind,
            "be one of " + ", ".join(repr(k) for k in kinds),
            "Rules of engines are in fluidsched.baselines.",
        )
    slack = check_slack(slack)
    for name, value in (("segments", segments), ("segment_count", segment_count), ("buffer", buffer)):
        if kind != "nested-wait" and value is not None:
            raise InputError(name, value, f"be left out: tables of kind {kind!r} have no segments")
    for name, option in (("mode", mode), ("prediction", prediction)):
        if kind != "lookahead" and option is not None:
            raise InputError(name, option, f"be left out: tables of kind {kind!r} do not look ahead")
    if horizon is not None:
        if kind not in ("wait", "nested-wait"):
            raise InputError(
                "horizon",
                horizon,
                f"be left out: what tables of kind {kind!r} promise holds at each iteration, whatever the horizon",
            )
        horizon = check_real("horizon", horizon, above=0.0)
    _check_solution(fluid)
    problem = Problem.of(
        fluid, overflow_probability, kv_reserve, rate_error=rate_error, error_budget=error_budget
    )
    if admitted_share != 1.0:
        if kind == "lookahead":
            raise InputError("admitted_share", admitted_share, "be left out: look-ahead tables keep no rates")
        if isinstance(admitted_share, str):
            check_choice("admitted_share", admitted_share, ("auto",), "Or give a share, e.g. 0.97.")
            margin = INSIDE_SLACK if slack == "auto" else slack
            share = _reach(fluid, problem, kind, margin, block_iterations, problem)[0]
            share = math.floor(share / SHARE_TOLERANCE + 1e-6) * SHARE_TOLERANCE
            if share == 0.0:
                share = 1.0  # no table at any load: compiling says why
        else:
            share = check_real("admitted_share", admitted_share, above=0.0, maximum=1.0)
        inside = dataclasses.replace(fluid, admitted_rate=share * np.asarray(fluid.admitted_rate))
        table = compile_policy(
            inside,
            kind,
            slack=slack,
            overflow_probability=overflow_probability,
            block_iterations=block_iterations,
            horizon=horizon,
            kv_reserve=kv_reserve,
            rate_error=rate_error,
            error_budget=error_budget,
            segments=segments,
            segment_count=segment_count,
            buffer=buffer,
        )
        line = entry(
            share,
            "× the solution's admitted rates",
            "given"
            if not isinstance(admitted_share, str)
            else "largest at which a table with the slack exists",
            "certain",
        )
        return dataclasses.replace(table, certificate={**table.certificate, "admitted_share": line})
    if kind == "capped":
        if block_iterations is not None:
            raise InputError("block_iterations", block_iterations, "be left out: a cap has no blocks")
        return _capped(fluid, problem, slack)
    if kind == "lookahead":
        if block_iterations is not None:
            raise InputError("block_iterations", block_iterations, "be left out: look-ahead has no blocks")
        if problem.rate_error is not None:
            raise InputError(
                "rate_error", rate_error, 'be 0 with "lookahead", whose headroom is that of a mix'
            )
        return _lookahead(fluid, problem, slack, "law" if mode is None else mode, prediction)
    if kind == "wait":
        return _wait(fluid, problem, slack, block_iterations, horizon)
    if kind == "nested-wait":
        if problem.rate_error is not None:
            raise InputError(
                "rate_error",
                rate_error,
                'be 0 with "nested-wait", whose certificate states the slack of every segment instead',
            )
        options = nested_wait.NestedOptions(
            slack,
            block_iterations,
            nested_wait.HORIZON if horizon is None else horizon,
            "optimal" if segments is None else segments,
            segment_count,
            "exact" if buffer is None else buffer,
        )
        return _nested(fluid, problem, options)
    return _gated(fluid, problem, slack, block_iterations)


def _check_solution(fluid: object) -> None:
    from fluidsched.fluid import FluidSolution  # here: whoever only reads tables does not load the solver

    if not isinstance(fluid, FluidSolution):
        raise InputError(
            "fluid", fluid, "be a FluidSolution", "Solve one with fluidsched.solve_fluid(workload, server)."
        )


def largest_load(
    fluid: FluidSolution,
    kind: str,
    *,
    slack: float = 0.0,
    overflow_probability: float = 0.01,
    block_iterations: int | None = None,
    kv_reserve: float = 0.0,
    rate_error: float | Sequence[float] = 0.0,
    error_budget: float | None = None,
) -> float:
    """Return the largest share of the fluid boundary at which a table of this kind exists.

    Parameters
    ----------
    fluid : FluidSolution
        Names the workload, whose offered mix is scaled, and the server.
    kind, overflow_probability, block_iterations, kv_reserve, rate_error, error_budget
        As in `compile_policy`.
    slack : float
        ε the table has to have.

    Returns
    -------
    float
        In [0, 1], to within 0.001 but for "capped"; 0 where no table exists at any load. "nested-wait" with cuts
        of least memory and memory holding for an hour.

    Examples
    --------
    >>> import fluidsched as fs
    >>> server = fs.catalog.server("a100-80gb", "llama-2-7b")
    >>> fluid = fs.solve_fluid(fs.workloads.azure_conv().at_load(0.8, server), server)
    >>> round(largest_load(fluid, "capped"), 3)
    0.986
    """
    check_choice("kind", kind, COMPILED_KINDS)
    slack = check_real("slack", slack, minimum=0.0)
    problem = Problem.of(
        fluid, overflow_probability, kv_reserve, rate_error=rate_error, error_budget=error_budget
    )
    return _reach(fluid, problem, kind, slack, block_iterations)[0]


def _reach(
    fluid: FluidSolution,
    problem: Problem,
    kind: str,
    slack: float,
    block_iterations: int | None,
    full: Problem | None = None,
) -> tuple[float, Callable[[Problem], list[str]]]:
    """The largest share of the boundary at which a table exists, and what forbids one at a problem's rates.

    Of the boundary along the offered mix, or of the rates of `full`.
    """
    budget = _token_budget(problem)
    full = boundary_problem(fluid, problem) if full is None else full
    if kind == "capped":
        share = min(capped.carried(full, capped.plan_cap(full)[1], budget) / (1.0 + slack), 1.0)
        return share, lambda offered: ["memory" if capped.plan_cap(offered)[1] == 0 else "time"]
    if kind == "wait":
        lengths = wait.block_lengths(problem.mean_profile.stages, block_iterations, problem.size)
        return (
            largest_share(full, lambda offered, k: wait.wait_exists(offered, slack, k), lengths),
            lambda offered: wait.why_not(offered, slack, lengths),
        )
    if kind == "nested-wait":
        options = nested_wait.NestedOptions(
            slack, block_iterations, nested_wait.HORIZON, "optimal", None, "lundberg"
        )
        nested_wait.check_bounded(problem)
        return (
            largest_share(
                full,
                lambda offered, k: nested_wait.nested_exists(offered, options, k),
                nested_wait.lengths_to_try(problem, options),
            ),
            lambda offered: nested_wait.why_not(offered, options),
        )
    return (
        largest_share(
            full,
            lambda offered, k: gated.gated_exists(offered, slack, budget, k),
            gated.windows_to_try(problem, budget, block_iterations),
        ),
        lambda offered: gated.why_not(offered, slack, budget, block_iterations),
    )


@dataclass(frozen=True)
class ReachCurve(Tabular):
    """How far tables reach against the number of request types; K lines, one per number of types and kind.

    Attributes
    ----------
    types : int64[K]
        Number of types.
    kind : tuple of str, length K
    share : float64[K]
        Largest share of the fluid boundary at which a table exists, to within 0.001; 0 where none does.
    reason : tuple of str or None, length K
        What forbids a table above that share: "rounding", "tokens", "batch", "memory" or "time", as
        `compile_policy` names them; None where one exists up to the boundary.
    server, workload : str
        Names.
    """

    types: NDArray[np.int64]
    kind: tuple[str, ...]
    share: NDArray[np.float64]
    reason: tuple[str | None, ...]
    server: str
    workload: str

    def __repr__(self) -> str:
        lines = [f"ReachCurve of {self.workload!r} on {self.server!r}, share of the fluid boundary"]
        for number, kind, share, reason in zip(self.types, self.kind, self.share, self.reason, strict=True):
            lines.append(f"  {number:>5,} types  {kind:<6}  {share:.3f}  {reason or ''}".rstrip())
        return "\n".join(lines)

    def to_frame(self) -> pd.DataFrame:
        """One row per number of types and kind."""
        import pandas as pd

        names = ("types", "kind", "share", "reason")
        return pd.DataFrame({name: getattr(self, name) for name in names})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the shares against the number of types; see `fluidsched.plots.reach_curve`."""
        from fluidsched import plots

        return plots.reach_curve(self, ax=ax)


def reach_curve(
    workload: Workload | Sequence[Workload],
    server: Server,
    *,
    kinds: Sequence[str] = TYPED_KINDS,
    slack: float = 0.0,
    overflow_probability: float = 0.01,
    kv_reserve: float = 0.0,
) -> ReachCurve:
    """Return how far tables reach against the number of types: few types are rough, many round up.

    Parameters
    ----------
    workload : Workload or sequence of Workload
        One workload is taken with all numbers of types it can be merged into (`Workload.merge_sizes`).
        Several, e.g. ``path.to_workload(types=...)`` for more and more types, are taken as they are.
    server : Server
    kinds : sequence of str
        Of "capped", "wait", "gated".
    slack, overflow_probability, kv_reserve
        As in `largest_load`.

    Returns
    -------
    ReachCurve

    Examples
    --------
    >>> import fluidsched as fs
    >>> server = fs.catalog.server("a100-80gb", "llama-2-7b")
    >>> curve = reach_curve(fs.workloads.azure_conv(), server, kinds=["wait"])
    >>> [(int(types), round(float(share), 3)) for types, share in zip(curve.types, curve.share)]
    [(1, 0.972), (3, 0.969), (6, 0.966), (12, 0.958)]
    >>> curve.reason[0]
    'rounding'
    """
    from fluidsched.fluid import solve_fluid

    for i, kind in enumerate(kinds):
        check_choice(f"kinds[{i}]", kind, TYPED_KINDS)
    slack = check_real("slack", slack, minimum=0.0)
    if isinstance(workload, Workload):
        workloads = [workload.merged(types) for types in workload.merge_sizes]
    else:
        workloads = list(workload)
    if not workloads:
        raise InputError("workload", "an empty sequence", "have at least one workload")
    lines: list[tuple[int, str, float, str | None]] = []
    for offered in workloads:
        fluid = solve_fluid(offered.at_load(0.5, server), server)
        problem = Problem.of(fluid, overflow_probability, kv_reserve)
        boundary = boundary_problem(fluid, problem)
        for kind in kinds:
            share, why_not = _reach(fluid, problem, kind, slack, None)
            above = share + 2.0 * SHARE_TOLERANCE
            reason = least_severe(why_not(boundary.at_rate(above * boundary.rate))) if above < 1.0 else None
            lines.append((len(offered), kind, share, reason))
    types, names, shares, reasons = zip(*lines, strict=True)
    return ReachCurve(
        np.array(types, dtype=np.int64), names, np.array(shares), reasons, server.name, workloads[-1].name
    )


_PROTECTED = "x_j = min_u (1 − Σ_i a_i v_i − u π_j − Q_j(Γ − u)) / (1 + u d_j)"
_ROBUST = {  # what holds for all errors, with the formulas of `fluidsched.policy.robust`
    "capped": "1 / (Σ_l a_l u_il + the Γ largest of d_l a_l u_il) > 1, u_il = w_il + c0_i S_l / N; memory in every mix",
    "wait": f"n_j ≥ (a_j / x_j) (T_k(n) − Σ_i v_i n_i), {_PROTECTED}",
    "gated": f"q_j ≥ (a_j / x_j) (T(q) − Σ_i v_i q_i), {_PROTECTED}",
}


def _price(
    fluid: FluidSolution, problem: Problem, kind: str, slack: Slack, block_iterations: int | None
) -> dict[str, Any]:
    """The certificate's line on rates that may be off, and the share of the reach it costs; none if they are known."""
    if problem.rate_error is None:
        return {}
    margin = 0.0 if slack == "auto" else slack
    reached = _reach(fluid, problem, kind, margin, block_iterations)[0]
    known = _reach(fluid, problem.without_errors(), kind, margin, block_iterations)[0]
    return {
        "robust": entry(
            problem.rate_error,
            "relative error of each rate; at most error_budget types' worth at once",
            "keeps up with all rates a_j (1 + e_j), |e_j| ≤ d_j, Σ |e_j| / d_j ≤ Γ: " + _ROBUST[kind],
            "expectation",
            error_budget=min(problem.error_budget, float(len(problem.rate))),
            reach=reached,
            reach_at_known_rates=known,
            price=1.0 - reached / known,
            price_formula="1 − reach / reach_at_known_rates: share of the load that could be certified, given up",
        )
    }


def _token_budget(problem: Problem) -> float:
    return float(min(TOKEN_BUDGET, problem.server.token_budget or TOKEN_BUDGET))


def _capped(fluid: FluidSolution, problem: Problem, slack: Slack) -> PolicyTable:
    real, cap = capped.plan_cap(problem)
    budget = _token_budget(problem)
    capped.check_carried(problem, fluid, cap, budget, slack)
    offered = float(np.sum(fluid.workload.arrival_rate))
    return PolicyTable(
        "capped",
        "capped",
        (TableType("*", arrival_rate=offered, admitted_rate=min(float(problem.rate.sum()), offered)),),
        max_in_service=cap,
        token_budget=TOKEN_BUDGET,
        kv_limit_tokens=problem.kv_limit,
        certificate={
            **capped.capped_certificate(problem, real, cap, budget),
            **_price(fluid, problem, "capped", slack, None),
        },
        provenance=provenance_of(fluid),
    )


def _lookahead(
    fluid: FluidSolution, problem: Problem, slack: Slack, mode: str, prediction: Prediction | None
) -> PolicyTable:
    believed = lookahead.checked_mode(mode)
    if prediction is not None and mode != "known":
        raise InputError("prediction", prediction, f"be left out: mode {mode!r} believes no prediction")
    plan = lookahead.plan_lookahead(problem, believed, prediction)
    multiple = lookahead.check_carried(problem, plan, _token_budget(problem), slack)
    offered = float(np.sum(fluid.workload.arrival_rate))
    return PolicyTable(
        f"lookahead-{mode}",
        "vllm",
        (TableType("*", arrival_rate=offered, admitted_rate=min(float(problem.rate.sum()), offered)),),
        token_budget=TOKEN_BUDGET,
        kv_limit_tokens=problem.kv_limit,
        lookahead=plan.lookahead,
        predictor="exact" if mode == "known" and prediction is None else None,
        certificate=lookahead.lookahead_certificate(problem, plan, multiple),
        provenance=provenance_of(fluid),
    )


def _wait(
    fluid: FluidSolution, problem: Problem, slack: Slack, block_iterations: int | None, horizon: float | None
) -> PolicyTable:
    problem, plan, tail = sized(
        problem, lambda asked: wait.plan_wait(asked, fluid, slack, block_iterations), wait.wait_overflow
    )
    rows = rows_of(fluid, plan.threshold, plan.threshold)
    return PolicyTable(
        "wait",
        "wait",
        rows,
        block_iterations=plan.block_iterations,
        freeze=True,
        predictor=predictor_of(rows),
        certificate={
            **wait.wait_certificate(problem, plan, tail, horizon),
            **_price(fluid, problem, "wait", slack, plan.block_iterations),
        },
        provenance=provenance_of(fluid),
    )


def _nested(fluid: FluidSolution, problem: Problem, options: nested_wait.NestedOptions) -> PolicyTable:
    plan = nested_wait.plan_nested(problem, fluid, options)
    offered = float(np.sum(fluid.workload.arrival_rate))
    first = int(plan.threshold[0])
    row = TableType(
        "*",
        arrival_rate=offered,
        admitted_rate=min(float(problem.rate.sum()), offered),
        threshold=first,
        gate=first,
    )
    return PolicyTable(
        "nested-wait",
        "nested-wait",
        (row,),
        plan.segments,
        block_iterations=plan.block_iterations,
        freeze=True,
        certificate=nested_wait.nested_certificate(problem, plan, options),
        provenance=provenance_of(fluid),
    )


def _gated(fluid: FluidSolution, problem: Problem, slack: Slack, window: int | None) -> PolicyTable:
    budget = _token_budget(problem)
    problem, (plan, spacing), tail = sized(
        problem,
        lambda asked: gated.plan_gated(asked, fluid, slack, budget, window),
        lambda asked, found: gated.gated_overflow(asked, found[0], found[1].lag),
    )
    rows = rows_of(fluid, plan.threshold, np.zeros_like(plan.threshold), plan.period)
    return PolicyTable(
        "gated",
        "gated",
        rows,
        token_budget=TOKEN_BUDGET,
        kv_limit_tokens=problem.kv_limit,
        predictor=predictor_of(rows),
        certificate={
            **gated.gated_certificate(problem, plan, spacing, tail, budget),
            **_price(fluid, problem, "gated", slack, plan.window),
        },
        provenance=provenance_of(fluid),
    )
