"""From a solution to a table: `compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fluidsched.cli.inputs import load_solution
from fluidsched.cli.options import Answer
from fluidsched.cli.outputs import emit, write_new
from fluidsched.errors import InputError


def compile_(
    solution: Annotated[Path, typer.Argument(help="A solution written by `solve --out`.")],
    answer: Answer,
    kind: Annotated[str, typer.Option(help="wait, nested-wait, gated, capped or lookahead.")] = "capped",
    slack: Annotated[str, typer.Option(help="auto, or a number: the margin ε of the conditions.")] = "auto",
    overflow_probability: Annotated[float, typer.Option(help="δ of the memory condition.")] = 0.01,
    block_iterations: Annotated[int | None, typer.Option(help="Block length k (default: chosen).")] = None,
    types: Annotated[
        int | None,
        typer.Option(
            help="Merge the request types into this many first (`plan` keeps the best of 1, 3, 12)."
        ),
    ] = None,
    horizon: Annotated[
        float | None,
        typer.Option(
            help="Seconds: nested-wait, how long memory has to hold (default 3600); wait, states its throughput."
        ),
    ] = None,
    segments: Annotated[
        str | None,
        typer.Option(help='nested-wait: "optimal", "quantiles", or boundaries in iterations, as 99,399.'),
    ] = None,
    segment_count: Annotated[
        int | None, typer.Option(help="nested-wait: number of segments (default: the best).")
    ] = None,
    buffer: Annotated[str | None, typer.Option(help="nested-wait: exact (default) or lundberg.")] = None,
    mode: Annotated[str | None, typer.Option(help="lookahead: law (default), known or reserve.")] = None,
    admitted_share: Annotated[
        str | None,
        typer.Option(
            help="Compile for this share of the admitted rates: a number up to 1, or auto, as little inside the "
            "boundary as a table needs (in overload the optimum leaves no slack)."
        ),
    ] = None,
    kv_reserve: Annotated[float, typer.Option(help="KV tokens the table leaves free.")] = 0.0,
    rate_error: Annotated[
        float,
        typer.Option(
            help="Relative error of every type's rate that the table must bear (not lookahead, nested-wait)."
        ),
    ] = 0.0,
    error_budget: Annotated[
        float | None,
        typer.Option(help="With --rate-error: at most this many types' worth of it at once (default: all)."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the table (default: its kind).")] = None,
) -> None:
    """Compile a solution into a policy table an online scheduler can follow, with its certificate.

    Examples:

    fluidsched compile solution.json --kind wait --types 1 --out wait.json

    fluidsched compile overloaded.json --kind capped --admitted-share auto --out capped.json
    """
    from fluidsched.fluid import solve_fluid
    from fluidsched.policy import compile_policy

    margin = _auto_or_number("--slack", slack)
    fluid = load_solution(solution)
    if types is not None:
        fluid = solve_fluid(fluid.workload.merged(types), fluid.server, objective=fluid.objective)
    table = compile_policy(
        fluid,
        kind,
        slack=margin,  # type: ignore[arg-type]  # any other word is refused by compile_policy itself
        overflow_probability=overflow_probability,
        block_iterations=block_iterations,
        kv_reserve=kv_reserve,
        rate_error=rate_error,
        error_budget=error_budget,
        horizon=horizon,
        segments=_boundaries(segments),
        segment_count=segment_count,
        buffer=buffer,
        mode=mode,
        admitted_share=1.0 if admitted_share is None else _auto_or_number("--admitted-share", admitted_share),
    )
    if name is not None:
        table = table.renamed(name)
    text = table.to_json()
    out = answer.out
    if out is not None:
        write_new(out, table.to_csv() if out.suffix.lower() == ".csv" else text, answer.force)
    emit(text if answer.as_json else repr(table))


def _auto_or_number(option: str, text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise InputError(option, text, 'be "auto" or a number') from None


def _boundaries(text: str | None) -> list[int] | str | None:
    """What --segments says: a word, or numbers with commas between."""
    if text is None or text.replace("-", "").isalpha():
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            "--segments", text, 'be "optimal", "quantiles" or whole numbers, as 99,399'
        ) from None
