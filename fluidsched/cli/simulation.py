"""Tables at work: `simulate` and `compare`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fluidsched._files import make_directory, write_whole
from fluidsched.cli.inputs import load_solution, load_table, load_workload, read_as
from fluidsched.cli.options import Answer, Demand, Sampling, ServerChoice
from fluidsched.cli.outputs import progress_bar
from fluidsched.errors import InputError

if TYPE_CHECKING:
    from fluidsched.policy import PolicyTable
    from fluidsched.simulation import SimulationResult


def simulate(
    tables: Annotated[list[str], typer.Argument(help="Table files (.json, .csv), or vllm, sarathi.")],
    demand: Demand,
    on: ServerChoice,
    sampling: Sampling,
    answer: Answer,
    solution: Annotated[
        Path | None,
        typer.Option("--solution", help="Take workload and server from a solution written by `solve`."),
    ] = None,
    replay: Annotated[bool, typer.Option("--replay", help="Replay the trace itself.")] = False,
    prefix_cache_tokens: Annotated[
        str | None,
        typer.Option(
            help="With --replay of a trace that names its blocks: tokens of a prefix cache of its own (inf: no limit), "
            "or shared: what is computed stays in the memory that the residents leave free."
        ),
    ] = None,
    warmup: Annotated[
        str | None,
        typer.Option(
            help="Seconds left out of the measures (default: a sixth of the horizon), or mser5: until the start of "
            "the runs is over by that rule."
        ),
    ] = None,
    engine: Annotated[str | None, typer.Option(help="kernel (the default) or reference.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Verify conservation, time order and Little's law.")
    ] = False,
    records: Annotated[
        Path | None,
        typer.Option(
            "--records",
            help="Also write to this directory, of every policy's first run: NAME.requests.csv (one row per request), "
            "NAME.occupancy.csv (over time) and NAME.trace.json (for Perfetto or chrome://tracing).",
        ),
    ] = None,
    parquet: Annotated[
        bool, typer.Option("--parquet", help="With --records: the requests as Parquet instead of CSV.")
    ] = False,
    no_records: Annotated[
        bool,
        typer.Option(
            "--no-records",
            help="Count requests and forget them: runs of any length in memory that does not grow with it. Means and "
            "rates are the same, quantiles of latencies within 0.8 %.",
        ),
    ] = False,
) -> None:
    """Simulate policy tables on common arrival paths.

    Example:

    fluidsched simulate wait.json vllm --solution solution.json --out result.json
    """
    from fluidsched.simulation import simulate as run
    from fluidsched.workload import ArrivalPath

    sampled = sampling.given(replay=replay, warmup=warmup)
    if prefix_cache_tokens is not None and not replay:
        raise InputError("--prefix-cache-tokens", prefix_cache_tokens, "come with --replay")
    if warmup not in (None, "mser5"):
        sampled["warmup"] = _seconds("--warmup", warmup)
    _check_records(records, parquet, answer.force)
    if no_records:
        _check_no_records({"--records": records, "--replay": replay, "--engine": engine == "reference"})
    policies = _load_differently_named(tables)
    options: dict[str, Any] = {"check": check, "records": not no_records}
    if not no_records:
        options["kept_replications"] = 0 if records is None else 1  # only the first run's are written
    if engine is not None:
        options["engine"] = engine
    if solution is not None:
        own = {"--workload": demand.workload, "--replay": replay or None, "--load": demand.load, **on.given()}
        for option, value in own.items():
            if value is not None:
                raise InputError(
                    option, str(value), "be left out with --solution", "The solution has its own."
                )
        fluid = load_solution(solution)
        the_server, asked = fluid.server, fluid.workload
    else:
        the_server = on.load()
        if replay:
            name = demand.workload
            path = (
                None
                if name is None
                else load_workload(name, prefix_cache_tokens=_cache_size(prefix_cache_tokens))
            )
            if not isinstance(path, ArrivalPath):
                received = "no --workload" if name is None else f"--workload {name}"
                raise InputError("--replay", received, "come with a trace as --workload")
            if demand.load is not None:
                raise InputError(
                    "--load", demand.load, "be left out with --replay", "A replayed path keeps its own rate."
                )
            with progress_bar(answer.quiet) as progress:
                result = run(
                    path,
                    the_server,
                    policies,
                    replications=1,
                    oversize="reject",
                    progress=progress,
                    **options,
                )
            _write_records(result, records, parquet)
            return answer.show(result)
        asked = demand.types(the_server)
    with progress_bar(answer.quiet) as progress:
        result = run(
            asked,
            the_server,
            policies,
            progress=progress,
            **{"horizon": 3600.0, "replications": 16, "seed": 7, **sampled},
            **options,
        )
    _write_records(result, records, parquet)
    return answer.show(result)


def _check_records(records: Path | None, parquet: bool, force: bool) -> None:
    """What would go wrong after the simulation is found before it."""
    if records is None:
        if parquet:
            raise InputError("--parquet", "given", "come with --records")
        return
    if os.path.exists(records) and (not records.is_dir() or (any(records.iterdir()) and not force)):
        raise InputError("--records", str(records), "be a new or empty directory", "Or use --force.")


def _check_no_records(others: Mapping[str, object]) -> None:
    """Options that look at every request, which runs without records forget."""
    for option, value in others.items():
        if value:
            raise InputError(
                "--no-records", f"{option} beside it", f"come without {option}", "That looks at requests."
            )


def _write_records(result: SimulationResult, records: Path | None, parquet: bool) -> None:
    """Requests, occupancy and timeline of every policy's first run."""
    if records is None:
        return
    make_directory("--records", records, parents=True)
    for policy in result.policies:
        stem = re.sub(r"[^\w.+-]+", "_", policy)
        result.write_requests(records / f"{stem}.requests.{'parquet' if parquet else 'csv'}", policy)
        write_whole(records / f"{stem}.occupancy.csv", result.occupancy_frame(policy).to_csv(index=False))
        result.chrome_trace(policy, path=records / f"{stem}.trace.json")


def _cache_size(text: str | None) -> float | Literal["shared"] | None:
    if text is None or text == "shared":
        return text  # type: ignore[return-value]
    try:
        return float(text)
    except ValueError:
        raise InputError("--prefix-cache-tokens", text, "be a number of tokens, inf, or shared") from None


def _seconds(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(option, text, "be a number of seconds, or mser5") from None


def _load_differently_named(files: list[str]) -> list[PolicyTable]:
    tables = [load_table(file) for file in files]
    names = [table.name for table in tables]
    for file, name in zip(files, names, strict=True):
        if names.count(name) > 1:
            raise InputError(
                "tables",
                f"{names.count(name)} called {name}, {file} first",
                "have different names",
                "`compile --name` gives a table a name of its own.",
            )
    return tables


def compare(
    on: ServerChoice,
    answer: Answer,
    result: Annotated[Path | None, typer.Argument(help="A result written by `simulate --out`.")] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            "--measured",
            help="Instead: a result of `vllm bench serve --save-result --save-detailed`, set beside the "
            "simulation of its requests on --gpu, --model or --server under --table (default vllm).",
        ),
    ] = None,
    bound: Annotated[
        Path | None,
        typer.Option("--bound", help="A solution written by `solve --out`, for all bounds it gives."),
    ] = None,
    tables: Annotated[
        list[str] | None,
        typer.Option(
            "--table", help="Table of a policy in the result, for the bounds on tables; repeatable."
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Policy the paired differences are taken against.")
    ] = None,
) -> None:
    """Set simulated policies beside each other, and each against every bound; or a measured run beside its simulation.

    Examples:

    fluidsched compare result.json --bound solution.json --table wait.json --baseline vllm

    fluidsched compare --measured bench.json --gpu a100-80gb --model llama-2-7b
    """
    from fluidsched.comparison import compare as set_beside
    from fluidsched.simulation import SimulationResult

    if (result is None) == (measured is None):
        given = "both" if result is not None else "nothing"
        raise InputError("RESULT or --measured", given, "be given, one of them")
    if measured is not None:
        from fluidsched.measured import compare_measured

        for name, value in (("--bound", bound), ("--baseline", baseline)):
            if value is not None:
                raise InputError(name, str(value), "be left out with --measured")
        names = tables or ["vllm"]
        if len(names) > 1:
            raise InputError("--table", ", ".join(names), "be given once with --measured")
        return answer.show(compare_measured(measured, on.load(), load_table(names[0])))
    assert result is not None
    runs = read_as("result", result, SimulationResult.from_dict)
    comparison = set_beside(
        runs,
        bound=None if bound is None else load_solution(bound, "--bound"),
        baseline=baseline,
        tables=[load_table(name) for name in tables or []],
    )
    return answer.show(comparison)
