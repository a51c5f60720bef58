"""The fluid program: `solve` and all its forms, the stability `region`, and `transient` for varying demand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluidsched import _files
from fluidsched._checks import check_choice, check_real
from fluidsched.cli.inputs import load_workload, own_rate_workload, per_type, server_and_number
from fluidsched.cli.options import Answer, Demand, Limits, ServerChoice, WorkloadOption
from fluidsched.cli.outputs import check_new, write_new
from fluidsched.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fluidsched.fluid import FluidProgram, Pool
    from fluidsched.workload import Workload

#: Length of a period of the embedded profiles, s.
_PROFILE_STEP = 300.0
_DAY = 86_400.0


def solve(
    demand: Demand,
    on: ServerChoice,
    limits: Limits,
    answer: Answer,
    objective: Annotated[
        str, typer.Option(help="What to carry most of: requests, output_tokens, total_tokens.")
    ] = "requests",
    reward: Annotated[
        list[str] | None,
        typer.Option("--reward", metavar="[TYPE=]VALUE", help="Worth of a request, instead of --objective."),
    ] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option("--floor", metavar="[TYPE=]SHARE", help="Share of the demand that must be admitted."),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="Share α-fairly: 0 total, 1 proportional, inf max-min."),
    ] = None,
    pool: Annotated[
        list[str] | None,
        typer.Option(
            "--pool",
            metavar="GPU[:TP]|SPEC=REPLICAS[@STAGE]",
            help="Route over pools, once for each; STAGE is whole (default), prefill or decode.",
        ),
    ] = None,
    ranging: Annotated[
        bool, typer.Option("--ranging", help="How far each reward and rate may move alone (sensitivity).")
    ] = False,
    sweep_to: Annotated[
        float | None,
        typer.Option("--sweep-to", help="Exact breakpoints from no load to this one; 1 is the boundary."),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option("--export", help="Write the program: .lp, .mps, or .json (labelled rows and columns)."),
    ] = None,
) -> None:
    """Solve the fluid program: what load fits, whom the optimum admits, what binds, what each type costs.

    Examples:

    fluidsched solve --workload azure_code --out solution.json

    fluidsched solve --load 1.3 --alpha 1

    fluidsched solve --load 1.3 --floor 0.2 --itl-target 0.05 --sweep-to 3 --json

    fluidsched solve --model llama-3-8b --pool h100=1@prefill --pool l40s=4@decode
    """
    from fluidsched.fluid import FluidProgram, solve_fair, solve_pools, sweep_load
    from fluidsched.fluid import ranging as ranges_of

    forms = {"--alpha": alpha, "--pool": pool or None, "--ranging": ranging or None, "--sweep-to": sweep_to}
    asked = [name for name, value in forms.items() if value is not None]
    if len(asked) > 1:
        raise InputError(" and ".join(asked), "together", "be asked one at a time")
    if reward and objective != "requests":
        raise InputError("--reward", reward[0], "come without --objective")
    if pool:
        if on.given().keys() - {"--model"} or demand.load is not None or export is not None:
            raise InputError("--pool", pool[0], "come without --gpu, --tp, --server, --load and --export")
        pools = _pools(pool, on.model, limits.itl_target)
        asked_for = own_rate_workload(demand.workload or "azure_conv")
    else:
        server = on.load()
        asked_for = demand.types(server)
    names = asked_for.type_names
    worth: str | list[float] = per_type("--reward", reward, names, None) if reward else objective
    floors = per_type("--floor", floor, names, 0.0) if floor else None
    if pool:
        return answer.show(
            solve_pools(asked_for, pools, worth, fairness_floor=floors, chunk_tokens=limits.chunk)
        )
    options: dict[str, Any] = {"fairness_floor": floors, **limits.arguments()}
    program = FluidProgram(asked_for, server, worth, **options)
    if export is not None:
        _export(program, export, answer.force)
    if alpha is not None:
        return answer.show(solve_fair(asked_for, server, alpha, worth, **options))
    if sweep_to is not None:
        return answer.show(sweep_load(program, check_real("--sweep-to", sweep_to, above=0.0)))
    solution = program.solve()
    if not ranging:
        return answer.show(solution)
    frame = ranges_of(solution)
    values = {"schema": "fluidsched.ranging/1", "types": frame.to_dict("records")}
    return answer.show_values(_files.to_jsonable(values), frame.to_string(index=False))


def _pools(given: list[str], model: str | None, itl_target: float | None) -> list[Pool]:
    """The pools of all --pool, those of one server named apart by their place."""
    from fluidsched.fluid import Pool

    pools: list[Pool] = []
    for text in given:
        amount, at, stage = text.partition("@")
        if at:
            check_choice("stage of --pool", stage, ("whole", "prefill", "decode"))
        one, replicas = server_and_number("--pool", amount, model, "REPLICAS")
        name = one.name
        if any(pool.name == name for pool in pools):
            name = f"{name} ({len(pools) + 1})"
        pools.append(Pool(one, replicas, stage or "whole", itl_target, name))  # type: ignore[arg-type]
    return pools


def _export(program: FluidProgram, path: Path, force: bool) -> None:
    from fluidsched.fluid.export import column_frame, row_frame, write_program

    check_choice("ending of --export", path.suffix, (".lp", ".mps", ".json"))
    check_new("--export", path, force)
    if path.suffix == ".json":
        frames = {"rows": row_frame(program.model), "columns": column_frame(program.model)}
        values = {name: frame.reset_index().to_dict("records") for name, frame in frames.items()}
        write_new(path, _files.dumps(_files.to_jsonable({"schema": "fluidsched.program/1", **values})), force)
        return
    write_program(program.model, path)


def region(
    demand: Demand,
    on: ServerChoice,
    limits: Limits,
    answer: Answer,
    boundary: Annotated[
        tuple[str, str] | None,
        typer.Option("--boundary", metavar="FIRST SECOND", help="The exact outline in these two types."),
    ] = None,
) -> None:
    """Say how far from instability a workload is, resource by resource, beside the conditions of three papers.

    Example:

    fluidsched region --workload azure_code --load 0.9 --itl-target 0.05
    """
    from fluidsched.bounds import stability_conditions
    from fluidsched.fluid import FluidProgram, stability_region

    server = on.load()
    asked_for = demand.types(server)
    whole = stability_region(asked_for, server, **limits.arguments())
    rates = asked_for.arrival_rate
    fluid = FluidProgram(asked_for, server, **limits.arguments()).model
    loads = dict(zip(fluid.resources, fluid.load(rates).tolist(), strict=True))
    conditions = stability_conditions(asked_for, server)
    critical, distance = float(whole.critical_rate(rates)), float(whole.distance(rates))
    lines = [f"offered              {rates.sum():.4g} req/s"]
    lines += [f"load of {name:<12} {value:.4g}" for name, value in loads.items()]
    lines += [
        f"critical rate        {critical:.4g} req/s of this mix ({whole.limiting_resource(rates)} runs out first)",
        f"distance to boundary {distance:.4g} req/s" + ("" if distance >= 0.0 else " (unstable)"),
        *(str(bound) for bound in conditions),
        repr(whole),
    ]
    values = whole.to_dict() | {
        "arrival_rate": rates,
        "load": loads,
        "critical_rate": critical,
        "limiting_resource": whole.limiting_resource(rates),
        "distance": distance,
        "conditions": [
            {"name": b.name, "value": b.value, "unit": b.unit, "condition": b.condition, "source": b.source}
            for b in conditions
        ],
    }
    if boundary is not None:
        outline = whole.boundary(*boundary)
        values["boundary"] = {"types": list(boundary), "vertices": outline}
        lines += [f"boundary in {boundary[0]}, {boundary[1]} (req/s)"]
        lines += [f"  {x:.4g}, {y:.4g}" for x, y in outline.tolist()]
    answer.show_values(_files.to_jsonable(values), "\n".join(lines))


def transient(
    on: ServerChoice,
    limits: Limits,
    answer: Answer,
    workload: WorkloadOption = None,
    scale: Annotated[float, typer.Option("--scale", help="Multiply the demand by this.")] = 1.0,
    day: Annotated[
        float | None,
        typer.Option("--day", metavar="SWING", help="A made-up day around the mean rate; swing 0 to 1."),
    ] = None,
    step: Annotated[float, typer.Option("--step", help="Length of a period, s.")] = _PROFILE_STEP,
    holding_cost: Annotated[
        list[str] | None,
        typer.Option("--holding-cost", metavar="[TYPE=]COST", help="Of a waiting request per second (1)."),
    ] = None,
    replicas: Annotated[float, typer.Option("--replicas", help="Replicas, or the most there may be.")] = 1.0,
    min_replicas: Annotated[
        float | None, typer.Option("--min-replicas", help="Fewest replicas; given, their number is chosen.")
    ] = None,
    replica_cost: Annotated[float, typer.Option("--replica-cost", help="Of a replica per second.")] = 0.0,
    ramp_up: Annotated[float, typer.Option("--ramp-up", help="Most replicas added a second.")] = float("inf"),
    ramp_down: Annotated[float, typer.Option("--ramp-down", help="Most replicas removed a second.")] = float(
        "inf"
    ),
) -> None:
    """Plan admissions and replicas against demand that varies: backlog, holding cost, ramps.

    Demand is the embedded trace's rate in steps of five minutes (its last, broken step as a whole one), the
    requests of a trace file counted by period, or with --day a smooth day around the workload's mean rate.

    Examples:

    fluidsched transient --workload azure_conv --scale 1.5

    fluidsched transient --day 0.6 --scale 4 --replicas 8 --min-replicas 1 --replica-cost 5 --ramp-up 0.002
    """
    from fluidsched.fluid import solve_transient

    name = "azure_conv" if workload is None else workload
    types = own_rate_workload(name)
    costs = per_type("--holding-cost", holding_cost or ["1"], types.type_names, 1.0)
    solution = solve_transient(
        types,
        on.load(),
        _periods(name, types, day, step) * check_real("--scale", scale, above=0.0),
        step=step,
        holding_cost=costs,
        replicas=replicas,
        min_replicas=min_replicas,
        replica_cost=replica_cost,
        ramp_up=ramp_up,
        ramp_down=ramp_down,
        **limits.arguments(),
    )
    answer.show(solution)


def _periods(name: str, types: Workload, day: float | None, step: float) -> NDArray[np.float64]:
    """Offered rates of every period and type, shape (T, J), req/s."""
    import numpy as np

    from fluidsched.fluid import demand_rates, sinusoidal_rates
    from fluidsched.workload import ArrivalPath, workloads

    step = check_real("--step", step, above=0.0, maximum=_DAY)
    if day is not None:
        mean, periods = types.total_arrival_rate, max(1, round(_DAY / step))
        return demand_rates(sinusoidal_rates(mean, amplitude=day, periods=periods), types, step)
    given = load_workload(name)
    if isinstance(given, ArrivalPath):
        return demand_rates(given, types, step)
    if name not in workloads.names():
        raise InputError("--workload", name, "be an embedded workload or a trace", "For a spec, add --day.")
    if step != _PROFILE_STEP:
        raise InputError(
            "--step", step, f"be {_PROFILE_STEP:g} with an embedded profile", "Or give the trace."
        )
    profile = workloads.rate_profile(name).to_dict()
    relative = np.asarray(profile["relative_rate"], dtype=np.float64)
    mean = np.average(relative, weights=profile["step"])
    return demand_rates(relative * (types.total_arrival_rate / mean), types, step)
