"""Text and files: how a plan reads in a terminal and what lies in its directory.

Objects print themselves (`repr`); this module puts their texts into one page, writes run directories with a
manifest, and reports versions. It computes no result of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluidsched import __version__
from fluidsched._files import dumps, fingerprint, whole_file, write_whole
from fluidsched.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fluidsched.planning import Plan
    from fluidsched.policy import PolicyTable
    from fluidsched.server.catalog import CatalogEntry

__all__ = [
    "catalog_text",
    "figures",
    "plan_summary",
    "plan_text",
    "run_directory",
    "show_versions",
    "write_plan",
]


_GUARANTEES = {
    "certain": "always",
    "probability": "up to the overflow probability",
    "expectation": "in the mean, in the long run",
}


def plan_text(plan: Plan) -> str:
    """The plan as one page of text, in pipeline order, remarks and recommendation last."""
    lines = [_heading("Workload"), repr(plan.workload), _heading("Server"), repr(plan.server)]
    lines += [_heading("Fluid solution"), repr(plan.fluid)]
    lines.append(_heading("Policy tables"))
    lines += [repr(table) for table in plan.tables]
    lines += [f"{name}: no table. {reason}" for name, reason in plan.missing.items()]
    lines += _certificate(plan.recommended_table)
    lines += [_heading("Comparison"), repr(plan.comparison)]
    lines += [_heading("Answer"), *plan.remarks]
    lines += _engine_lines(plan.recommended_table)
    return "\n".join(lines) + "\n"


def _certificate(table: PolicyTable) -> list[str]:
    """The entries of a certificate, a line each."""
    if not table.certificate:
        return []
    lines = [f"Certificate of {table.name!r}"]
    for name, entry in table.certificate.items():
        value = entry["value"]
        text = f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.4g}"
        lines.append(f"  {name:<21} {text:>10} {entry['unit']:<36} {_GUARANTEES[entry['guarantee']]}")
    return lines


def _engine_lines(table: PolicyTable) -> list[str]:
    """How to run a table on a stock engine, and what it would do differently."""
    arguments = table.to_vllm_args()
    if not arguments.arguments:
        return []
    lines = [
        f"As arguments of vLLM (names of version 0.33, not tried on an engine): {arguments.command_line()}"
    ]
    return lines + [f"  but not: {sentence}" for sentence in arguments.lost]


def _heading(title: str) -> str:
    return f"\n{title}\n{'─' * len(title)}"


def plan_summary(plan: Plan) -> dict[str, Any]:
    """What `summary.json` holds: the answer, the settings, the solution, and a row per policy."""
    return {
        "schema": "fluidsched.plan/1",
        "stable": plan.fluid.is_stable,
        "load": dict(zip(plan.fluid.resources, plan.fluid.load.tolist(), strict=True)),
        "offered_rate": plan.workload.total_arrival_rate,
        "critical_rate": plan.fluid.critical_rate,
        "binding_constraints": list(plan.fluid.binding_constraints),
        "recommended": plan.recommended,
        "remarks": list(plan.remarks),
        "missing": plan.missing,
        "settings": plan.settings,
        "fluid": plan.fluid.to_dict(),
        "policies": plan.runs.to_serve_summary(),
        "comparison": plan.comparison.to_dict(),
        "load_curve": None if plan.curve is None else plan.curve.to_dict(orient="records"),
    }


@contextlib.contextmanager
def run_directory(out: str | os.PathLike[str] | None, *, force: bool = False) -> Iterator[Path]:
    """Yield the directory for a run's files: `out`, or the first free ``fluidsched-plan-N`` here.

    A directory made for the run is removed again if the run fails before it wrote anything.

    Raises
    ------
    InputError
        If `out` is a file, or a directory in use without `force`.
    """
    if out is None:
        number = 1
        while True:
            directory = Path(f"fluidsched-plan-{number}")
            try:
                directory.mkdir()
                break
            except FileExistsError:
                number += 1
            except OSError as error:
                raise InputError(
                    "current directory", str(error), "be writable", "Give a place with --out."
                ) from None
        made = True
    else:
        directory = Path(out)
        made = not directory.exists()
        if not made and not directory.is_dir():
            raise InputError("out", str(directory), "name a directory, not a file")
        if not made and not force and any(directory.iterdir()):
            raise InputError(
                "out",
                f"{directory}, which is in use",
                "name a new or empty directory",
                "Or write into it with --force.",
            )
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError("out", str(error), "name a directory that can be made") from None
    try:
        yield directory
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()  # only an empty one: what has been written stays
        raise


def write_plan(plan: Plan, directory: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write policy.json, policies/, summary.json, comparison.csv, the pictures and, last, manifest.json.

    Each file appears whole or not at all; the manifest, written last, names all the others with their SHA-256 and,
    of JSON files, the schema.

    Parameters
    ----------
    plan : Plan
    directory : path
        New or empty, unless `force`.
    force : bool, optional
        Write over what is there; files of other names stay.

    Returns
    -------
    pathlib.Path
        The directory.

    Raises
    ------
    InputError
        If the directory is in use and `force` is not given.
    """
    with run_directory(directory, force=force) as root:
        files = {
            "policy.json": plan.recommended_table.to_json(),
            "workload.json": dumps(plan.workload.to_dict()),
            "server.json": dumps(plan.server.to_dict()),
            "solution.json": dumps(plan.fluid.to_dict()),
            "result.json": dumps(plan.runs.to_dict()),
            "comparison.csv": plan.comparison.to_frame().to_csv(index=False),
            "summary.json": dumps(plan_summary(plan)),
        }
        files |= {f"policies/{table.name}.json": table.to_json() for table in plan.tables}
        if plan.curve is not None:
            files["load_curve.csv"] = plan.curve.to_csv(index=False)
        (root / "policies").mkdir(exist_ok=True)
        written = [write_whole(root / name, text) for name, text in files.items()]
        schemas = {name: json.loads(text)["schema"] for name, text in files.items() if name.endswith(".json")}
        for name, figure in figures(plan):
            with whole_file(root / name) as temporary:
                figure.savefig(temporary, format="png")
            written.append(root / name)
        manifest = {
            "schema": "fluidsched.manifest/1",
            "library": {"name": "fluidsched", "version": __version__},
            "inputs": {
                "workload": fingerprint(plan.workload.to_dict()),
                "server": fingerprint(plan.server.to_dict()),
            },
            "settings": plan.settings,
            "files": {
                (name := path.relative_to(root).as_posix()): {
                    "bytes": path.stat().st_size,
                    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                }
                | ({"schema": schemas[name]} if name in schemas else {})
                for path in written
            },
        }
        write_whole(root / "manifest.json", dumps(manifest))
    return root


def figures(plan: Plan) -> Iterator[tuple[str, Figure]]:
    """Yield (file name, figure) of each picture of a plan: KV occupancy, latency distributions, load curve."""
    from matplotlib.figure import Figure

    from fluidsched import plots

    with plots.style():
        figure = Figure(figsize=(8.0, 4.0), layout="constrained")
        plots.kv_occupancy(plan.runs, bound=plan.fluid, ax=figure.add_subplot())
        yield "kv_occupancy.png", figure

        figure = Figure(figsize=(9.0, 3.6), layout="constrained")
        for position, measure in enumerate(("ttft", "e2e"), start=1):
            plots.latency_distribution(plan.runs, measure, ax=figure.add_subplot(1, 2, position))
        yield "latency.png", figure

        if plan.curve is not None:
            figure = Figure(figsize=(9.0, 3.8), layout="constrained")
            panels = (
                ("request_throughput", "throughput (req/s)", "linear"),
                ("mean_ttft", "mean TTFT (s)", "log"),
            )
            for position, (measure, label, scale) in enumerate(panels, start=1):
                plots.load_curve(
                    plan.curve,
                    measure,
                    ylabel=label,
                    scale=scale,
                    critical_rate=plan.fluid.critical_rate,
                    ax=figure.add_subplot(1, 2, position),
                )
            yield "load_curve.png", figure


def catalog_text(entries: Sequence[CatalogEntry]) -> str:
    """The catalog as a table for people."""
    header = f"{'GPU':<16} {'model':<14} tp  {'source':<26}  KV tokens  mean error  worst"
    rows = [
        f"{e.gpu:<16} {e.model:<14} {e.tensor_parallel:>2}  {e.source:<26} {e.kv_capacity_tokens:>10,}"
        f"  {e.mean_error['two-piece']:>10.1%}  {e.largest_error['two-piece']:>5.0%}"
        for e in entries
    ]
    return "\n".join(
        [
            header,
            *rows,
            f"{len(rows)} entries; KV tokens that fit, and relative errors of the iteration time's two-piece fit. "
            "Of several sources the first is used.",
        ]
    )


def show_versions() -> str:
    """Versions of fluidsched, Python, the platform and the dependencies, one a line.

    Returns
    -------
    str
        To print or to paste into a bug report.

    Examples
    --------
    >>> import fluidsched as fs
    >>> fs.show_versions().startswith("fluidsched")
    True
    """
    lines = [
        f"fluidsched {__version__}",
        f"python {platform.python_version()}",
        f"platform {platform.platform()}",
    ]
    for name in ("numpy", "scipy", "highspy", "cvxpy", "matplotlib", "numba", "pandas", "typer", "rich"):
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name} (not installed)")
    return "\n".join(lines)
