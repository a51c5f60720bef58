"""`fluidsched tune`: search over a table's numbers by simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fluidsched.cli.inputs import check_load, load_table, load_workload
from fluidsched.cli.options import Answer, Demand, ServerChoice
from fluidsched.cli.outputs import check_new, progress_bar
from fluidsched.errors import InputError


def tune(
    aim: Annotated[
        str, typer.Argument(help="goodput, stable_rate, or a latency to make small: mean_ttft, p99_e2e, …")
    ],
    demand: Demand,
    on: ServerChoice,
    answer: Answer,
    kind: Annotated[
        str | None,
        typer.Option("--kind", help="Start from a compiled table: capped (default), gated, wait, …"),
    ] = None,
    table: Annotated[
        str | None, typer.Option("--table", metavar="NAME|FILE", help="Start from vllm, sarathi or a file.")
    ] = None,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Search on pieces of the trace's first half, confirm on its second."),
    ] = False,
    slo: Annotated[
        list[str] | None,
        typer.Option("--slo", metavar="LATENCY=S", help="Limit per request, such as ttft=1."),
    ] = None,
    attainment: Annotated[
        float, typer.Option("--attainment", help="Share of requests that must meet every SLO.")
    ] = 0.0,
    knob: Annotated[
        list[str] | None,
        typer.Option("--knob", metavar="NAME=LOW:HIGH", help="What to vary (default: all of the kind)."),
    ] = None,
    candidates: Annotated[int, typer.Option("--candidates", help="Tables tried beside the start.")] = 32,
    horizon: Annotated[float, typer.Option("--horizon", help="Simulated seconds per path.")] = 1800.0,
    confirmations: Annotated[
        int, typer.Option("--confirmations", help="Fresh paths on which winner and start meet.")
    ] = 16,
    seed: Annotated[int, typer.Option("--seed", help="Seed of design and paths.")] = 7,
    directory: Annotated[
        Path | None, typer.Option("--directory", help="Keep the journals here; a stopped search goes on.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes.")] = None,
    table_out: Annotated[
        Path | None, typer.Option("--table-out", help="Write the table to keep as JSON to this file.")
    ] = None,
) -> None:
    """Search for a better table and confirm what is found on paths the search never saw.

    Examples:

    fluidsched tune mean_ttft --kind gated --load 0.9

    fluidsched tune goodput --table vllm --slo ttft=1 --slo tpot=0.1 --load 0.95 --workers 2
    """
    from fluidsched.fluid import solve_fluid
    from fluidsched.policy import compile_policy
    from fluidsched.tuning import tune as search
    from fluidsched.workload import ArrivalPath

    if kind is not None and table is not None:
        raise InputError("--kind", kind, "be left out with --table")
    if aim == "goodput" and not slo:
        raise InputError(
            "--slo", "none", "be given to tune goodput", "For example --slo ttft=1 --slo tpot=0.1."
        )
    if table_out is not None:
        check_new("--table-out", table_out, answer.force)
    answer.check_new()
    server = on.load()
    types = demand.types(server)
    path: ArrivalPath | None = None
    if trace:
        if check_load(demand.load) is not None:
            raise InputError("--load", demand.load, "be left out with --trace", "A trace keeps its own rate.")
        name = demand.workload or "azure_conv"
        given = load_workload(name)
        if not isinstance(given, ArrivalPath):
            raise InputError("--trace", f"--workload {name}", "come with a trace file as --workload")
        path = given
    start = (
        compile_policy(solve_fluid(types, server), kind or "capped") if table is None else load_table(table)
    )
    with progress_bar(answer.quiet) as progress:
        found = search(
            types if path is None else path.labelled(types),
            server,
            start,
            aim=aim,
            slo=dict(_pair("--slo", text) for text in slo or ()),
            attainment=attainment,
            knobs=None if knob is None else dict(_range(text) for text in knob),
            candidates=candidates,
            horizon=horizon,
            confirmations=confirmations,
            seed=seed,
            directory=directory,
            workers=workers,
            progress=progress,
        )
    if table_out is not None:
        found.best.to_json(table_out)
    return answer.show(found)


def _number(option: str, text: str, word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise InputError(option, text, "have numbers after the equals sign") from None


def _pair(option: str, text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(option, text, "be LATENCY=SECONDS, such as ttft=1")
    return name, _number(option, text, value)


def _range(text: str) -> tuple[str, tuple[float, float]]:
    name, equals, ends = text.partition("=")
    low, colon, high = ends.partition(":")
    if not equals or not colon:
        raise InputError("--knob", text, "be NAME=LOW:HIGH, such as max_in_service=40:160")
    return name, (_number("--knob", text, low), _number("--knob", text, high))
