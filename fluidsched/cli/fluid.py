"""The fluid program: `solve`."""

from __future__ import annotations

from typing import Annotated

import typer

from fluidsched.cli.inputs import (
    ForceOption,
    GpuOption,
    JsonOption,
    LoadOption,
    ModelOption,
    OutFileOption,
    ServerOption,
    TpOption,
    WorkloadOption,
    load_server,
    typed_workload,
)
from fluidsched.cli.outputs import show


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

    the_server = load_server(gpu, model, tp, server)
    solution = solve_fluid(typed_workload(workload, load, the_server), the_server, objective=objective)
    show(solution, out, force, as_json)
