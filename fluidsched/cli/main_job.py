"""`fluidsched plan`: the main job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fluidsched import _files
from fluidsched.cli.inputs import check_load, latency_targets, load_workload
from fluidsched.cli.options import (
    Demand,
    ForceOption,
    Sampling,
    ServerChoice,
    Shown,
    TpotOption,
    TtftOption,
    WarmupOption,
)
from fluidsched.cli.outputs import emit, progress_bar
from fluidsched.errors import InputError


def plan(
    demand: Demand,
    on: ServerChoice,
    sampling: Sampling,
    shown: Shown,
    replay: Annotated[
        bool, typer.Option("--replay", help="Replay the trace itself instead of sampling from it.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Directory for the results (default: fluidsched-plan-N here)."),
    ] = None,
    force: ForceOption = False,
    objective: Annotated[
        str, typer.Option(help="What to carry most of: requests, output_tokens, total_tokens.")
    ] = "requests",
    warmup: WarmupOption = None,
    ttft_p99: TtftOption = None,
    tpot_p99: TpotOption = None,
    curve: Annotated[
        bool, typer.Option(help="Simulate other loads too, and the largest that one server carries.")
    ] = True,
) -> None:
    """The main job: solve, compile, simulate beside today's engines, compare with the bound, recommend, write files.

    Without arguments: the embedded Azure conversation workload at 0.8 of the fluid boundary of one A100-80GB that
    serves Llama-2-7B.

    Examples:

    fluidsched plan --gpu h100 --model llama-3-8b --load 0.9

    fluidsched plan --workload trace.csv --replay --out results

    fluidsched plan --workload trace.csv --ttft-p99 1 --tpot-p99 0.06
    """
    from fluidsched import planning, reporting
    from fluidsched.workload import ArrivalPath, workloads

    sampled = sampling.given(replay=replay and not curve, warmup=warmup)
    the_server = on.load()
    name = "azure_conv" if demand.workload is None else demand.workload
    asked = load_workload(name)
    if replay and not isinstance(asked, ArrivalPath):
        raise InputError("--replay", f"--workload {name}", "come with a trace as --workload")
    load = 0.8 if demand.load is None and name in workloads.names() else check_load(demand.load)
    with reporting.run_directory(out, force=force) as directory, progress_bar(shown.quiet) as progress:
        result = planning.plan(
            asked,
            the_server,
            load=load,
            replay=replay,
            objective=objective,
            targets=latency_targets(ttft_p99, tpot_p99) or None,
            curve=curve,
            progress=progress,
            **sampled,
        )
        reporting.write_plan(result, directory, force=True)
    emit(_files.dumps(result.to_dict()) if shown.as_json else reporting.plan_text(result))
    if not shown.quiet:
        print(f"Written to {directory}", file=sys.stderr)
