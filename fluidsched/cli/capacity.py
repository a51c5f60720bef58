"""`fluidsched capacity`: how many servers of which kind."""

from __future__ import annotations

from typing import Annotated

import typer

from fluidsched._checks import check_real
from fluidsched.cli.inputs import latency_targets, own_rate_workload, server_and_number
from fluidsched.cli.options import Answer, ItlOption, TpotOption, TtftOption, WorkloadOption
from fluidsched.cli.outputs import progress_bar
from fluidsched.errors import InputError


def capacity(
    cost: Annotated[
        list[str],
        typer.Option(
            "--cost",
            metavar="GPU[:TP]|SPEC=COST",
            help="A server that can be had and the cost of one replica, in any unit; once for each server.",
        ),
    ],
    answer: Answer,
    model: Annotated[
        str, typer.Option("--model", help="Model of the catalog that all serve.")
    ] = "llama-2-7b",
    workload: WorkloadOption = None,
    scale: Annotated[float, typer.Option("--scale", help="Multiply the workload's rates by this.")] = 1.0,
    headroom: Annotated[
        float | None, typer.Option("--headroom", help="Carry 1 + this times the demand (default 0).")
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", help="The other way round: the largest load this buys.")
    ] = None,
    itl_target: ItlOption = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Check and correct the fleet by simulation against --ttft-p99, --tpot-p99."
        ),
    ] = False,
    ttft_p99: TtftOption = None,
    tpot_p99: TpotOption = None,
    confidence: Annotated[float, typer.Option("--confidence", help="Of the verified fleet.")] = 0.95,
    horizon: Annotated[
        float | None, typer.Option("--horizon", help="Simulated seconds (default: 600 lives of a request).")
    ] = None,
    replications: Annotated[int, typer.Option("--replications", help="Runs of each fleet tried.")] = 16,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the runs.")] = 7,
) -> None:
    """Find the cheapest fleet for a workload, or the largest load for a budget.

    Examples:

    fluidsched capacity --workload azure_conv --scale 20 --model llama-3-8b --cost l40s=1 --cost h100=2.5

    fluidsched capacity --cost a100=1.8 --scale 4 --verify --ttft-p99 1 --tpot-p99 0.06
    """
    from fluidsched.fluid import plan_capacity, plan_load

    targets = latency_targets(ttft_p99, tpot_p99)
    if verify != bool(targets):
        given = "--verify alone" if verify else f"{', '.join(targets)} without --verify"
        raise InputError("--verify", given, "come with --ttft-p99 or --tpot-p99, and these with it")
    if budget is not None and headroom is not None:
        raise InputError("--headroom", headroom, "be left out with --budget", "The load is the answer there.")
    servers, prices = zip(*(server_and_number("--cost", text, model, "COST") for text in cost), strict=True)
    asked = own_rate_workload("azure_conv" if workload is None else workload).scaled(
        check_real("--scale", scale, above=0.0)
    )
    if budget is None:
        plan = plan_capacity(asked, servers, prices, headroom=headroom or 0.0, itl_target=itl_target)
    else:
        plan = plan_load(asked, servers, prices, budget, itl_target=itl_target)
    if not verify:
        return answer.show(plan)
    from fluidsched.fleets import verify_capacity

    with progress_bar(answer.quiet) as progress:
        verified = verify_capacity(
            plan,
            targets,
            horizon=horizon,
            replications=replications,
            seed=seed,
            confidence=confidence,
            progress=progress,
        )
    return answer.show(verified)
