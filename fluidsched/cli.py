"""The command line: `fluidsched plan`, the whole chain, and its steps one at a time.

Results go to standard output (a table for people, ``--json`` for programs), remarks and progress to standard error.
Exit statuses: 0 an answer was produced, 1 no answer exists, 2 the input was wrong, 3 a solver or internal failure,
130 interrupted (files written so far are whole).
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer

from fluidsched import __version__, _files
from fluidsched._checks import check_real
from fluidsched.errors import FluidschedError, InfeasibleError, InputError

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from fluidsched.fluid import FluidSolution
    from fluidsched.policy import PolicyTable
    from fluidsched.server import Server
    from fluidsched.workload import ArrivalPath, Workload

__all__ = ["app", "main"]

EXIT_NO_ANSWER, EXIT_INPUT, EXIT_FAILURE, EXIT_INTERRUPTED = 1, 2, 3, 130

app = typer.Typer(
    name="fluidsched",
    help="Decide with mathematics how an LLM server admits and schedules requests.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

P = ParamSpec("P")
R = TypeVar("R")


def main() -> None:
    """Entry point of the `fluidsched` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # where ≥ or ─ cannot be written: a question mark, not a traceback
            stream.reconfigure(errors="replace")
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    app()


def _leave(message: str, status: int) -> NoReturn:
    print(f"fluidsched: {message}", file=sys.stderr)
    raise SystemExit(status)


def _answers(function: Callable[P, R]) -> Callable[P, R]:
    """Turn the library's errors into a sentence on stderr and the documented exit status."""

    @functools.wraps(function)
    def command(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except InputError as error:
            _leave(str(error), EXIT_INPUT)
        except InfeasibleError as error:
            _leave(str(error), EXIT_NO_ANSWER)
        except FluidschedError as error:
            _leave(f"{type(error).__name__}: {error}", EXIT_FAILURE)
        except KeyboardInterrupt:
            _leave("interrupted; files written so far are whole.", EXIT_INTERRUPTED)

    return command


# ---- what several commands take -------------------------------------------------------------------------------

WorkloadOption = Annotated[
    str | None,
    typer.Option(
        "--workload",
        "-w",
        metavar="NAME|TRACE|SPEC",
        help="azure_conv (the default), azure_code or mooncake_synthetic, a trace file, or a .toml/.json spec.",
    ),
]
LoadOption = Annotated[
    float | None,
    typer.Option("--load", help="Scale to this share of the fluid boundary (embedded default: 0.8)."),
]
GpuOption = Annotated[str | None, typer.Option("--gpu", help="GPU of the catalog (default a100-80gb).")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Model of the catalog (default llama-2-7b).")
]
TpOption = Annotated[int | None, typer.Option("--tp", help="Tensor-parallel degree (default 1).")]
ServerOption = Annotated[
    Path | None,
    typer.Option("--server", metavar="SPEC", help="A server spec (.toml/.json) instead of the catalog."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable result on standard output.")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no remarks on standard error.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Write over files that are there.")]
WarmupOption = Annotated[
    float | None, typer.Option(help="Seconds left out of the measures (default: a sixth of the horizon).")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of the arrival paths (default 7).")]
HorizonOption = Annotated[
    float | None, typer.Option("--horizon", help="Simulated seconds per replication (default 3600).")
]
ReplicationsOption = Annotated[
    int | None,
    typer.Option("--replications", help="Independent arrival paths, common to all policies (default 16)."),
]
OutFileOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="Write the result as JSON to this file.")
]


def _spec(argument: str, path: Path) -> dict[str, Any]:
    """Read a TOML or JSON file into a dictionary."""
    text = _files.read_text(argument, path)
    if path.suffix.lower() == ".toml":
        import tomllib

        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{argument} {path}", str(error), "be valid TOML") from None
    data = _files.loads(str(path), text)
    if not isinstance(data, dict):
        raise InputError(f"{argument} {path}", type(data).__name__, "hold one JSON object")
    return data


def _read(argument: str, path: Path, reader: Callable[[dict[str, Any]], R]) -> R:
    """What `reader` makes of a spec file; its complaints name the file."""
    data = _spec(argument, path)
    try:
        return reader(data)
    except InputError as error:
        raise InputError(f"{path}: {error.argument}", error.received, error.required, error.remedy) from None


def _load_workload(name: str) -> Workload | ArrivalPath:
    """An embedded workload by name, a spec by its suffix, else a trace."""
    from fluidsched.workload import Workload, read_trace, workloads
    from fluidsched.workload.model import SCHEMA
    from fluidsched.workload.traces import is_json_trace

    if name in workloads.names():
        return workloads.get(name)
    path = Path(name)
    if not path.exists():
        near = get_close_matches(name, workloads.names(), n=3)
        hint = (
            f"Did you mean {' or '.join(near)}?" if near else f"Embedded are {', '.join(workloads.names())}."
        )
        raise InputError(
            "--workload", name, "name an embedded workload or an existing trace or spec file", hint
        )
    if path.suffix.lower() == ".toml" or (path.suffix.lower() == ".json" and not is_json_trace(path)):
        return Workload.from_dict({"schema": SCHEMA, "name": path.stem} | _spec("--workload", path))
    return read_trace(path)


def _load_server(gpu: str | None, model: str | None, tp: int | None, spec: Path | None) -> Server:
    from fluidsched.server import Server, catalog

    if spec is not None:
        if gpu is not None or model is not None or tp is not None:
            raise InputError("--server", str(spec), "stand alone", "Leave out --gpu, --model and --tp.")
        return Server.from_dict(_with_server_defaults(_spec("--server", spec), spec.stem))
    return catalog.server(gpu or "a100-80gb", model or "llama-2-7b", tensor_parallel=1 if tp is None else tp)


def _with_server_defaults(given: dict[str, Any], name: str) -> dict[str, Any]:
    """A server's spec with what a person may leave out, as in `Server`; TOML cannot say null."""
    from fluidsched.server.iteration import SCHEMA as ITERATION_SCHEMA
    from fluidsched.server.server import SCHEMA as SERVER_SCHEMA

    limits = dict.fromkeys(("max_batch_size", "token_budget", "block_size"))
    spec: dict[str, Any] = {"schema": SERVER_SCHEMA, "name": name, "source": "", **limits} | given
    pieces = spec.get("iteration_time")
    if isinstance(pieces, dict):
        spec["iteration_time"] = {"schema": ITERATION_SCHEMA} | pieces
    return spec


def _check_load(load: float | None) -> float | None:
    return load if load is None else check_real("--load", load, above=0.0)


def _typed_workload(name: str | None, load: float | None, server: Server) -> Workload:
    """The workload of `--workload` and `--load`, a trace turned into 12 request types."""
    from fluidsched.planning import types_for
    from fluidsched.workload import ArrivalPath, workloads

    given = _load_workload("azure_conv" if name is None else name)
    if isinstance(given, ArrivalPath):
        given = given.to_workload(types=types_for(given))
    elif load is None and (name is None or name in workloads.names()):
        load = 0.8
    load = _check_load(load)
    return given if load is None else given.at_load(load, server)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress bar on stderr while it is a terminal; otherwise nothing."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield report


def _emit(text: str) -> None:
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def _sampling(replay: bool, **options: float | None) -> dict[str, Any]:
    """The sampling options that were given; none may be where the trace itself is replayed."""
    given = {name: value for name, value in options.items() if value is not None}
    if replay and given:
        name, value = next(iter(given.items()))
        raise InputError(
            f"--{name}", value, "be left out with --replay", "A replay runs the trace once, whole."
        )
    return given


def _write_new(out: Path, text: str, force: bool) -> None:
    if out.exists() and not force:
        raise InputError(
            "--out", str(out), "name a file that does not exist", "Choose another, or add --force."
        )
    _files.write_whole(out, text)


def _show(result: Any, out: Path | None, force: bool, as_json: bool) -> None:
    """Write a step's result as JSON to `out`, if given, and show it: for people, or as JSON."""
    text = _files.dumps(result.to_dict())
    if out is not None:
        _write_new(out, text, force)
    _emit(text if as_json else repr(result))


# ---- commands ---------------------------------------------------------------------------------------------------


@app.command()
@_answers
def plan(
    workload: WorkloadOption = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Replay the trace itself instead of sampling from it.")
    ] = False,
    load: LoadOption = None,
    gpu: GpuOption = None,
    model: ModelOption = None,
    tp: TpOption = None,
    server: ServerOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Directory for the results (default: fluidsched-plan-N here)."),
    ] = None,
    force: ForceOption = False,
    objective: Annotated[
        str, typer.Option(help="What to carry most of: requests, output_tokens, total_tokens.")
    ] = "requests",
    horizon: HorizonOption = None,
    warmup: WarmupOption = None,
    replications: ReplicationsOption = None,
    seed: SeedOption = None,
    curve: Annotated[bool, typer.Option(help="Simulate the load curve too.")] = True,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """The main job: solve, compile, simulate beside today's engines, compare with the bound, write the files.

    Without arguments: the embedded Azure conversation workload at 0.8 of the fluid boundary of one A100-80GB that
    serves Llama-2-7B.

    Examples:

    fluidsched plan --gpu h100 --model llama-3-8b --load 0.9

    fluidsched plan --workload trace.csv --replay --out results
    """
    from fluidsched import planning, reporting
    from fluidsched.workload import workloads

    sampling = _sampling(replay, horizon=horizon, warmup=warmup, replications=replications, seed=seed)
    the_server = _load_server(gpu, model, tp, server)
    name = "azure_conv" if workload is None else workload
    asked = _load_workload(name)
    load = 0.8 if load is None and name in workloads.names() else _check_load(load)
    with reporting.run_directory(out, force=force) as directory, _progress(quiet) as progress:
        result = planning.plan(
            asked,
            the_server,
            load=load,
            replay=replay,
            objective=objective,
            curve=curve,
            progress=progress,
            **sampling,
        )
        reporting.write_plan(result, directory, force=True)
    _emit(_files.dumps(result.to_dict()) if as_json else reporting.plan_text(result))
    if not quiet:
        print(f"Written to {directory}", file=sys.stderr)


@app.command()
@_answers
def solve(
    workload: WorkloadOption = None,
    load: LoadOption = None,
    gpu: GpuOption = None,
    model: ModelOption = None,
    tp: TpOption = None,
    server: ServerOption = None,
    objective: Annotated[
        str, typer.Option(help="What to carry most of: requests, output_tokens, total_tokens.")
    ] = "requests",
    out: OutFileOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Solve the fluid program: what load fits, whom the optimum admits, what binds, what each type costs.

    Example:

    fluidsched solve --workload azure_code --out solution.json
    """
    from fluidsched.fluid import solve_fluid

    the_server = _load_server(gpu, model, tp, server)
    solution = solve_fluid(_typed_workload(workload, load, the_server), the_server, objective=objective)
    _show(solution, out, force, as_json)


def _load_solution(path: Path) -> FluidSolution:
    from fluidsched.fluid import FluidSolution

    return _read("solution", path, FluidSolution.from_dict)


@app.command(name="compile")
@_answers
def compile_(
    solution: Annotated[Path, typer.Argument(help="A solution written by `solve --out`.")],
    kind: Annotated[str, typer.Option(help="wait, gated or capped.")] = "capped",
    slack: Annotated[str, typer.Option(help="auto, or a number: the margin ε of the conditions.")] = "auto",
    overflow_probability: Annotated[float, typer.Option(help="δ of the memory condition.")] = 0.01,
    block_iterations: Annotated[int | None, typer.Option(help="Block length k (default: chosen).")] = None,
    types: Annotated[
        int | None,
        typer.Option(
            help="Merge the request types into this many first (`plan` keeps the best of 1, 3, 12)."
        ),
    ] = None,
    out: OutFileOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compile a solution into a policy table an online scheduler can follow, with its certificate.

    Example:

    fluidsched compile solution.json --kind wait --types 1 --out wait.json
    """
    from fluidsched.fluid import solve_fluid
    from fluidsched.policy import compile_policy

    margin: float | str = slack
    if slack != "auto":
        try:
            margin = float(slack)
        except ValueError:
            raise InputError("--slack", slack, 'be "auto" or a number') from None
    fluid = _load_solution(solution)
    if types is not None:
        fluid = solve_fluid(fluid.workload.merged(types), fluid.server, objective=fluid.objective)
    table = compile_policy(
        fluid,
        kind,
        slack=margin,  # type: ignore[arg-type]  # any other word is refused by compile_policy itself
        overflow_probability=overflow_probability,
        block_iterations=block_iterations,
    )
    text = table.to_json()
    if out is not None:
        _write_new(out, table.to_csv() if out.suffix.lower() == ".csv" else text, force)
    _emit(text if as_json else repr(table))


def _load_table(name: str) -> PolicyTable:
    """A stock engine by name, else a table file (.json or .csv)."""
    from fluidsched.policy import PolicyTable, baselines

    stock = {"vllm": baselines.vllm(), "sarathi": baselines.sarathi()}
    if name in stock:
        return stock[name]
    path = Path(name)
    if not path.exists():
        near = get_close_matches(name, stock, n=1)
        raise InputError(
            "table",
            name,
            f"be one of {', '.join(stock)} or an existing .json or .csv table file",
            f"Did you mean {near[0]!r}?" if near else "",
        )
    return PolicyTable.from_csv(path) if path.suffix.lower() == ".csv" else PolicyTable.from_json(path)


@app.command()
@_answers
def simulate(
    tables: Annotated[list[str], typer.Argument(help="Table files (.json, .csv), or vllm, sarathi.")],
    solution: Annotated[
        Path | None,
        typer.Option("--solution", help="Take workload and server from a solution written by `solve`."),
    ] = None,
    workload: WorkloadOption = None,
    replay: Annotated[bool, typer.Option("--replay", help="Replay the trace itself.")] = False,
    load: LoadOption = None,
    gpu: GpuOption = None,
    model: ModelOption = None,
    tp: TpOption = None,
    server: ServerOption = None,
    horizon: HorizonOption = None,
    warmup: WarmupOption = None,
    replications: ReplicationsOption = None,
    seed: SeedOption = None,
    engine: Annotated[str | None, typer.Option(help="kernel (the default) or reference.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Verify conservation, time order and Little's law.")
    ] = False,
    out: OutFileOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Simulate policy tables on common arrival paths.

    Example:

    fluidsched simulate wait.json vllm --solution solution.json --out result.json
    """
    from fluidsched.simulation import simulate as run
    from fluidsched.workload import ArrivalPath

    sampling = _sampling(replay, horizon=horizon, warmup=warmup, replications=replications, seed=seed)
    policies = [_load_table(name) for name in tables]
    options: dict[str, Any] = {"check": check} if engine is None else {"engine": engine, "check": check}
    if solution is not None:
        for option, value in (
            *(("--workload", workload), ("--replay", replay or None), ("--load", load)),
            *(("--gpu", gpu), ("--model", model), ("--tp", tp), ("--server", server)),
        ):
            if value is not None:
                raise InputError(
                    option, str(value), "be left out with --solution", "The solution has its own."
                )
        fluid = _load_solution(solution)
        the_server, asked = fluid.server, fluid.workload
    else:
        the_server = _load_server(gpu, model, tp, server)
        if replay:
            path = None if workload is None else _load_workload(workload)
            if not isinstance(path, ArrivalPath):
                received = "no --workload" if workload is None else f"--workload {workload}"
                raise InputError("--replay", received, "come with a trace as --workload")
            if load is not None:
                raise InputError(
                    "--load", load, "be left out with --replay", "A replayed path keeps its own rate."
                )
            with _progress(quiet) as progress:
                result = run(
                    path,
                    the_server,
                    policies,
                    replications=1,
                    oversize="reject",
                    progress=progress,
                    **options,
                )
            return _show(result, out, force, as_json)
        asked = _typed_workload(workload, load, the_server)
    with _progress(quiet) as progress:
        result = run(
            asked,
            the_server,
            policies,
            progress=progress,
            **{"horizon": 3600.0, "replications": 16, "seed": 7, **sampling},
            **options,
        )
    return _show(result, out, force, as_json)


@app.command()
@_answers
def compare(
    result: Annotated[Path, typer.Argument(help="A result written by `simulate --out`.")],
    bound: Annotated[
        Path | None, typer.Option("--bound", help="A solution written by `solve --out`, for the fluid bound.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Policy the paired differences are taken against.")
    ] = None,
    out: OutFileOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Set simulated policies beside each other and the fluid bound.

    Example:

    fluidsched compare result.json --bound solution.json --baseline vllm
    """
    from fluidsched.comparison import compare as set_beside
    from fluidsched.simulation import SimulationResult

    runs = _read("result", result, SimulationResult.from_dict)
    comparison = set_beside(runs, bound=None if bound is None else _load_solution(bound), baseline=baseline)
    _show(comparison, out, force, as_json)


@app.command()
@_answers
def sweep(
    spec: Annotated[Path, typer.Argument(help="A TOML file with grid, cells, base and seed of the sweep.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory of the sweep; the same command goes on there.")
    ],
    workers: Annotated[int | None, typer.Option(help="Worker processes (default: all in this one).")] = None,
    dask: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on the Dask cluster of this scheduler, tcp://…")
    ] = None,
    join: Annotated[
        bool, typer.Option("--join", help="Share the cells with a sweep that is at work in the directory.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run cells that failed again.")
    ] = False,
    table_format: Annotated[
        str, typer.Option("--format", help="parquet, csv, or auto: Parquet where pyarrow is installed.")
    ] = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Simulate every cell of a grid or list, keep each result at once, and write one table.

    Stopped in any way, the same command goes on where it was; the table does not depend on what ran it.

    Example:

    fluidsched sweep loads.toml --out loads --workers 4
    """
    from fluidsched.sweeps import sweep as run

    if dask is not None and workers is not None:
        raise InputError("--workers", str(workers), "be left out with --dask", "The cluster has its own.")
    try:
        with _dask_executor(dask) as (executor, tasks_at_once), _progress(quiet) as progress:
            result = run(
                spec,
                out,
                executor=executor,
                workers=tasks_at_once or workers,
                join=join,
                retry_failed=retry_failed,
                format=table_format,  # type: ignore[arg-type]  # any other word is refused by sweep itself
                progress=progress,
            )
    except KeyboardInterrupt:
        _leave(
            f"interrupted; finished cells are kept, the same command goes on in {out} with the rest.",
            EXIT_INTERRUPTED,
        )
    answer = {"table": str(result.path), "cells": result.cells, "failed": result.failed}
    _emit(_files.dumps(answer) if as_json else repr(result))
    if result.failed and not quiet:
        print(
            "Failed cells have their diagnosis in the table; --retry-failed runs them again.", file=sys.stderr
        )
    if result.failed == result.cells:
        raise SystemExit(EXIT_NO_ANSWER)


@contextmanager
def _dask_executor(address: str | None) -> Iterator[tuple[Executor | None, int | None]]:
    """An executor on a Dask cluster and the tasks it runs at once; without an address (None, None)."""
    if address is None:
        yield None, None
        return
    try:
        from distributed import Client
    except ImportError:
        raise InputError("--dask", address, "come with Dask installed", "Install fluidsched[dask].") from None
    try:
        client = Client(address, timeout=5)
    except (OSError, ValueError) as error:
        raise InputError(
            "--dask", f"{address} ({error})", "be the address of a Dask scheduler that answers"
        ) from None
    with client:
        yield client.get_executor(pure=False), max(1, sum(client.nthreads().values()))


@app.command()
@_answers
def catalog(
    gpu: Annotated[str | None, typer.Option(help="Only this GPU.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the GPUs and models with measured iteration times, their capacity and the errors of their fits.

    Example:

    fluidsched catalog --gpu h100
    """
    from fluidsched.reporting import catalog_text
    from fluidsched.server import catalog as entries

    chosen = [
        entry
        for entry in entries.entries()
        if (gpu is None or entry.gpu == entries.canonical_gpu(gpu))
        and (model is None or entry.model == entries.canonical_model(model))
    ]
    if not chosen:
        known = sorted(
            {entry.model for entry in entries.entries() if gpu and entry.gpu == entries.canonical_gpu(gpu)}
        )
        raise InputError("--model", str(model), f"be one the catalog has on {gpu}: {', '.join(known)}")
    _emit(_files.dumps(chosen) if as_json else catalog_text(chosen))


@app.command()
@_answers
def calibrate(
    points: Annotated[
        Path, typer.Argument(help="CSV or CSV.gz: n_tok, batch_decode, kv_tok, pre_attn, t_s (seconds).")
    ],
    kv_capacity: Annotated[float, typer.Option("--kv-capacity", help="KV tokens that fit in memory.")],
    form: Annotated[str, typer.Option(help="two-piece, affine or paper.")] = "two-piece",
    max_batch_size: Annotated[int | None, typer.Option(help="Most requests in one iteration.")] = None,
    token_budget: Annotated[int | None, typer.Option(help="Most tokens in one iteration.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per KV block.")] = None,
    max_batch_tokens: Annotated[
        int | None, typer.Option(help="Leave points with more tokens out of the fit.")
    ] = None,
    largest_mean_error: Annotated[
        float, typer.Option(help="Refuse a fit with a larger mean relative error.")
    ] = 0.25,
    name: Annotated[str, typer.Option(help="Name of the server.")] = "server",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the server spec (for --server) to this file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw measured against fitted times (.png, .pdf, .svg).")
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fit a server's iteration time to measured iterations; a fit that cannot be trusted is refused.

    Example:

    fluidsched calibrate points.csv --kv-capacity 120000 --out server.json
    """
    from fluidsched.server import calibrate as fit

    fitted = fit(
        points,
        form,  # type: ignore[arg-type]  # any other word is refused by calibrate itself
        kv_capacity=kv_capacity,
        max_batch_size=max_batch_size,
        token_budget=token_budget,
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        largest_mean_error=largest_mean_error,
        name=name,
    )
    if plot is not None:
        if plot.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise InputError("--plot", str(plot), "end in .png, .pdf or .svg")
        if plot.exists() and not force:
            raise InputError("--plot", str(plot), "name a file that does not exist", "Add --force.")
    if out is not None:
        _write_new(out, fitted.server.to_json(), force)
    if plot is not None:
        from matplotlib.figure import Figure

        from fluidsched import plots

        with plots.style():
            figure = Figure(figsize=(4.6, 4.2), layout="constrained")
            plots.calibration(fitted, ax=figure.subplots())
        with _files.whole_file(plot) as temporary:
            figure.savefig(temporary)
    _emit(fitted.to_json() if as_json else repr(fitted))


def _print_version(value: bool) -> None:
    if value:
        _emit(f"fluidsched {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave."),
    ] = False,
) -> None:
    pass
