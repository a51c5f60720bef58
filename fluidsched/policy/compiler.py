r"""From a fluid solution to a policy table with its certificate.

The solution says how fast each type may be admitted (a_j) for the server to keep up in the mean. A table
adds what makes that true at every moment: limits on how many are let in at a time, such that memory holds
them, and slack, such that queues stay short. `fluidsched.policy.capped`, `.wait` and `.gated` derive them;
each table's certificate states what it guarantees, entry by entry: value, unit, formula, and whether it is
"certain" (on every path), holds with "probability" 1 − δ, or in "expectation" (long-run means).

Types that the optimum refuses (a_j = 0, in overload) get threshold 0: they are never admitted. Types it
rations (a_j < λ_j) are admitted at a_j; as long as all their demand is offered their queue grows. Thin the
path by `fluid.admitted_fraction` to see the admitted stream alone; the certificate's queue and TTFT are
those of that stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fluidsched._checks import check_choice, check_real
from fluidsched.errors import InputError
from fluidsched.policy import capped, gated, wait
from fluidsched.policy.problem import (
    Problem,
    Slack,
    check_slack,
    largest_share,
    predictor_of,
    provenance_of,
    rows_of,
)
from fluidsched.policy.table import PolicyTable, TableType

if TYPE_CHECKING:
    from fluidsched.fluid import FluidSolution

__all__ = ["compile_policy", "largest_load"]

COMPILED_KINDS = ("capped", "wait", "gated")
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
) -> PolicyTable:
    """Compile a fluid solution into a policy table of the given kind.

    Parameters
    ----------
    fluid : FluidSolution
        What to admit, and the workload and server it was solved for.
    kind : {"capped", "wait", "gated"}
        "capped": a cap on the requests in service, no types. "wait": WAIT in blocks of iterations.
        "gated": at most n_j requests of type j in any k_j consecutive iterations.
    slack : "auto" or float
        ε: the table keeps up with 1 + ε times the admitted rates. "auto": the largest ε at which a table
        exists, for each block length (to within 1e-6 of 1 + ε, by bisection: a table that exists at one ε
        exists at every smaller one); "capped", whose cap depends on memory alone, just has to carry the
        admitted rates.
    overflow_probability : float
        δ in [0, 1/2]: memory holds with probability 1 − δ at each iteration where lengths are random. 0:
        every request is taken as long as its type allows, and memory holds with certainty.
    block_iterations : int, optional
        Iterations per block of "wait", window of "gated". None: chosen by the compiler.
    horizon : float, optional
        Seconds; "wait" then also states its throughput over that time from an empty start.
    kv_reserve : float
        Tokens of the KV capacity the table leaves free, for what the model does not know: a drifting mix,
        lengths correlated in time. Memory bounds are then those of the rest.

    Returns
    -------
    PolicyTable
        With certificate and provenance.

    Raises
    ------
    InfeasibleError
        No such table exists. `reason` is "time" (the server is too slow), "memory", "rounding" (it exists
        for thresholds that need not be whole), "batch" (the largest batch is too small) or "tokens" (a
        token budget is); the message says up to which share of the fluid boundary one exists.
    InputError
        An argument is out of range, the iteration time is no maximum of affine pieces, or δ = 0 where a
        type's lengths have no upper bound; a type states cached prefixes and the kind is not "capped".

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
    if kind not in COMPILED_KINDS:
        raise InputError(
            "kind",
            kind,
            "be one of " + ", ".join(repr(k) for k in COMPILED_KINDS),
            "Rules of engines are in fluidsched.baselines.",
        )
    slack = check_slack(slack)
    if horizon is not None:
        horizon = check_real("horizon", horizon, above=0.0)
    _check_solution(fluid)
    if kind != "capped":
        fluid.workload.require_no_cached_prefixes(f"a table of kind {kind!r}")
    problem = Problem.of(fluid, overflow_probability, kv_reserve)
    if kind == "capped":
        if block_iterations is not None:
            raise InputError("block_iterations", block_iterations, "be left out: a cap has no blocks")
        return _capped(fluid, problem, slack)
    if kind == "wait":
        return _wait(fluid, problem, slack, block_iterations, horizon)
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
) -> float:
    """Return the largest share of the fluid boundary at which a table of this kind exists.

    Parameters
    ----------
    fluid : FluidSolution
        Names the workload, whose offered mix is scaled, and the server.
    kind, overflow_probability, block_iterations, kv_reserve
        As in `compile_policy`.
    slack : float
        ε the table has to have.

    Returns
    -------
    float
        In [0, 1], to within 0.001 for "wait" and "gated"; 0 where no table exists at any load.

    Examples
    --------
    >>> import fluidsched as fs
    >>> server = fs.catalog.server("a100-80gb", "llama-2-7b")
    >>> fluid = fs.solve_fluid(fs.workloads.azure_conv().at_load(0.8, server), server)
    >>> round(largest_load(fluid, "capped"), 3)
    0.987
    """
    check_choice("kind", kind, COMPILED_KINDS)
    slack = check_real("slack", slack, minimum=0.0)
    if kind != "capped":
        fluid.workload.require_no_cached_prefixes(f"a table of kind {kind!r}")
    problem = Problem.of(fluid, overflow_probability, kv_reserve)
    if kind == "capped":
        return min(capped.share_carried(problem, fluid, _token_budget(problem)) / (1.0 + slack), 1.0)
    if kind == "wait":
        lengths = wait.block_lengths(problem.mean_profile.stages, block_iterations)
        return largest_share(fluid, problem, lambda offered: wait.wait_exists(offered, slack, lengths))
    return largest_share(
        fluid,
        problem,
        lambda offered: gated.gated_exists(offered, slack, _token_budget(problem), block_iterations),
    )


def _token_budget(problem: Problem) -> float:
    return float(min(TOKEN_BUDGET, problem.server.token_budget or TOKEN_BUDGET))


def _capped(fluid: FluidSolution, problem: Problem, slack: Slack) -> PolicyTable:
    real, cap = capped.plan_cap(problem)
    budget = _token_budget(problem)
    multiple = capped.check_carried(problem, fluid, cap, budget, slack)
    offered = float(np.sum(fluid.workload.arrival_rate))
    return PolicyTable(
        "capped",
        "capped",
        (TableType("*", arrival_rate=offered, admitted_rate=min(float(problem.rate.sum()), offered)),),
        max_in_service=cap,
        token_budget=TOKEN_BUDGET,
        kv_limit_tokens=problem.kv_limit,
        certificate=capped.capped_certificate(problem, real, cap, multiple, budget),
        provenance=provenance_of(fluid),
    )


def _wait(
    fluid: FluidSolution, problem: Problem, slack: Slack, block_iterations: int | None, horizon: float | None
) -> PolicyTable:
    plan = wait.plan_wait(problem, fluid, slack, block_iterations)
    rows = rows_of(fluid, plan.threshold, plan.threshold)
    return PolicyTable(
        "wait",
        "wait",
        rows,
        block_iterations=plan.block_iterations,
        freeze=True,
        predictor=predictor_of(rows),
        certificate=wait.wait_certificate(problem, plan, horizon),
        provenance=provenance_of(fluid),
    )


def _gated(fluid: FluidSolution, problem: Problem, slack: Slack, window: int | None) -> PolicyTable:
    budget = _token_budget(problem)
    plan, spacing = gated.plan_gated(problem, fluid, slack, budget, window)
    rows = rows_of(fluid, plan.threshold, np.zeros_like(plan.threshold), plan.period)
    return PolicyTable(
        "gated",
        "gated",
        rows,
        token_budget=TOKEN_BUDGET,
        kv_limit_tokens=problem.kv_limit,
        predictor=predictor_of(rows),
        certificate=gated.gated_certificate(problem, plan, spacing, budget),
        provenance=provenance_of(fluid),
    )
