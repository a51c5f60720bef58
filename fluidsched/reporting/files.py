"""What lies in a plan's directory: tables, numbers, pictures, the page, and a manifest that names them all."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluidsched import __version__
from fluidsched._files import dumps, fingerprint, make_directory, write_whole
from fluidsched.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fluidsched.planning import Plan

__all__ = ["figures", "pictures", "plan_summary", "run_directory", "write_plan"]


def plan_summary(plan: Plan) -> dict[str, Any]:
    """What `summary.json` holds: the answer, the recommendation, the settings, the solution, a row per policy."""
    return {
        "schema": "fluidsched.plan/1",
        "stable": plan.fluid.is_stable,
        "load": dict(zip(plan.fluid.resources, plan.fluid.load.tolist(), strict=True)),
        "offered_rate": plan.workload.total_arrival_rate,
        "critical_rate": plan.fluid.critical_rate,
        "binding_constraints": list(plan.fluid.binding_constraints),
        "recommended": plan.recommended,
        "recommendation": plan.recommendation.to_dict(),
        "admission": None if plan.admission is None else plan.admission.to_dict(),
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
        made = not os.path.exists(directory)
        if not made and not directory.is_dir():
            raise InputError("out", str(directory), "name a directory, not a file")
        if not made and not force and any(directory.iterdir()):
            raise InputError(
                "out",
                f"{directory}, which is in use",
                "name a new or empty directory",
                "Or write into it with --force.",
            )
        make_directory("out", directory, parents=True)
    try:
        yield directory
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()  # only an empty one: what has been written stays
        raise


def write_plan(plan: Plan, directory: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write policy.json, policies/, summary.json, comparison.csv, pictures, report.html and, last, manifest.json.

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
    from fluidsched.reporting.page import page

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
        images = dict(pictures(plan))
        written += [write_whole(root / name, data) for name, data in images.items()]
        written.append(write_whole(root / "report.html", page(plan, images)))
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


def pictures(plan: Plan) -> Iterator[tuple[str, bytes]]:
    """Yield (file name, PNG) of each of `figures`."""
    for name, figure in figures(plan):
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
        yield name, stream.getvalue()


def figures(plan: Plan) -> Iterator[tuple[str, Figure]]:
    """Yield (file name, figure) of each picture of a plan: KV occupancy, latency distributions, load curve, gains."""
    from matplotlib.figure import Figure

    from fluidsched import plots

    with plots.style():
        figure = Figure(figsize=(6.8, 3.0), layout="constrained")
        plots.kv_occupancy(plan.runs, bound=plan.fluid, ax=figure.add_subplot())
        yield "kv_occupancy.png", figure

        figure = Figure(figsize=(6.8, 2.8), layout="constrained")
        for position, measure in enumerate(("ttft", "e2e"), start=1):
            plots.latency_distribution(plan.runs, measure, ax=figure.add_subplot(1, 2, position))
        yield "latency.png", figure

        if plan.curve is not None:
            figure = Figure(figsize=(6.8, 3.0), layout="constrained")
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
                    reach=_reach(plan),
                    ax=figure.add_subplot(1, 2, position),
                )
            yield "load_curve.png", figure

        measures = ("request_throughput", "mean_ttft", "mean_e2e")
        gained = {gain.measure for gain in plan.recommendation.gains if gain.of_engine > 0.0}
        if plan.curve is not None and gained.issuperset(measures):
            figure = Figure(figsize=(6.8, 2.7), layout="constrained")
            for position, measure in enumerate(measures, start=1):
                plots.gains(plan.recommendation, measure, ax=figure.add_subplot(1, 3, position))
            yield "gains.png", figure


def _reach(plan: Plan) -> tuple[float, float] | None:
    """Rates up to which the recommended policy keeps up and from which it does not; None where not both are known."""
    reach = plan.recommendation.reach
    if not 0.0 < reach.holds <= reach.fails < math.inf:
        return None
    return reach.holds * reach.critical_rate, reach.fails * reach.critical_rate
