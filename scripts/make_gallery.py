"""Draw every figure of `fluidsched.plots` into docs/gallery/, one PNG each, from seeded runs, and its page.

    python scripts/make_gallery.py [DIRECTORY]

Beside the pictures lies what they say: `gallery.json` has, for each, its labels, legends, and lines with their data.
The tests draw the same figures again and compare both (`tests/test_gallery.py`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fluidsched as fs

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "gallery"
DPI = 150


def examples() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name of the plot function, drawing of one example)."""
    plots = fs.plots
    server = fs.catalog.server("a100-80gb", "llama-2-7b", tensor_parallel=1)
    office = fs.Workload(
        [
            fs.RequestType("chat", 4.0, 300, fs.lengths.geometric(150, maximum=1024)),
            fs.RequestType("summarise", 1.0, 3000, 200),
            fs.RequestType("code", 2.0, 1500, 30),
        ],
        name="office",
    )
    program = fs.FluidProgram(office, server)
    overload = fs.solve_fluid(office.at_load(1.5, server), server)
    yield "request_types", lambda: office.plot()
    yield (
        "stability_boundary",
        lambda: fs.stability_region(office, server).plot("chat", "summarise", [0, 0, 1]),
    )
    yield "rate_sweep", lambda: fs.fluid.sweep_load(program, largest=3.0).plot()
    yield "admitted_rates", lambda: overload.plot()
    yield (
        "fair_shares",
        lambda: plots.fair_shares([fs.solve_fair(overload.workload, server, a) for a in (0.0, 1.0, np.inf)]),
    )
    yield (
        "fair_curve",
        lambda: plots.fair_curve(
            [fs.solve_fair(overload.workload, server, a) for a in (0.0, 0.3, 0.6, 1.0, 2.0, 4.0, np.inf)]
        ),
    )
    busy = office.at_load(0.85, server)
    day = fs.fluid.sinusoidal_rates(busy.total_arrival_rate, amplitude=0.6, periods=24)
    yield (
        "transient",
        lambda: fs.solve_transient(busy, server, day, step=3600.0).plot(),
    )

    conversations = fs.workloads.azure_conv().at_load(0.9, server)
    fluid = fs.solve_fluid(conversations, server)
    capped = fs.compile_policy(fluid, "capped")
    runs = fs.simulate(
        conversations,
        server,
        [capped, fs.baselines.vllm(), fs.baselines.sarathi()],
        horizon=900.0,
        warmup=150.0,
        replications=6,
        seed=7,
    )
    yield "arrivals", lambda: runs.paths[0].plot()
    yield "kv_occupancy", lambda: plots.kv_occupancy(runs, bound=fluid)
    yield "latency_distribution", lambda: runs.plot()
    yield "estimates", lambda: fs.compare(runs, bound=fluid).plot("p99_ttft")
    loads = load_frame(conversations, server, [capped, fs.baselines.vllm(), fs.baselines.sarathi()])
    critical = fluid.critical_rate
    yield (
        "load_curve",
        lambda: plots.load_curve(
            loads, "mean_ttft", ylabel="mean TTFT (s)", scale="log", critical_rate=critical
        ),
    )
    yield (
        "throughput_latency",
        lambda: plots.throughput_latency(loads, "mean_ttft", ylabel="mean TTFT (s)", critical_rate=critical),
    )

    small = fs.Server(4000, fs.IterationTime.affine(0.05, 1e-4, 1e-3, 1e-5), name="small")
    fixed = fs.Workload([fs.RequestType("short", 2.0, 20, 12), fs.RequestType("long", 1.0, 60, 40)])
    half = fixed.at_load(0.5, small)
    wait = fs.compile_policy(
        fs.solve_fluid(half, small), "wait", overflow_probability=0.0, block_iterations=4
    )
    path = half.sample(30.0, seed=3)
    yield (
        "policy_timeline",
        lambda: fs.simulation.policy_timeline(path, small, wait, horizon=20.0, start=12.0, bins=40).plot(),
    )
    yield "gains", lambda: plots.gains(fs.plan(half, small, horizon=120.0, replications=3).recommendation)
    yield "thresholds", lambda: fs.compile_policy(fs.solve_fluid(busy, server), "gated").plot()
    yield "wait_curve", lambda: fs.policy.wait_curve(fluid).plot()
    answers = fs.RequestType("answers", 100.0, 50, fs.lengths.geometric(mean=30, maximum=300))
    light = fs.Server(250_000, fs.IterationTime.affine(0.05, 1e-5, 5e-5, 1e-8))
    unknown = fs.solve_fluid(fs.Workload([answers]), light)
    yield "segment_curve", lambda: fs.policy.segment_curve(unknown, block_iterations=5).plot()
    yield (
        "reach_curve",
        lambda: fs.policy.reach_curve(fs.workloads.azure_conv(), server).plot(),
    )
    yield "queue_law", lambda: plots.queue_law(4, 3.6, observed=counted_queue(4, 3.6))
    yield (
        "trajectory",
        lambda: fs.fluid_trajectory(half, small, fs.baselines.vllm()).plot(),
    )

    gpus = [fs.Pool(fs.catalog.server(name, "llama-2-7b"), name=name) for name in ("a100-80gb", "h100")]
    fleets = [fs.plan_capacity(office.scaled(k), gpus, cost=[1.8, 2.5]) for k in np.linspace(0.5, 6, 12)]
    yield "routing", lambda: fleets[-1].plot()
    yield "capacity_curve", lambda: plots.capacity_curve(fleets)
    yield (
        "fleet_checks",
        lambda: fs.verify_capacity(
            fs.plan_capacity(fixed.scaled(40.0), [small], cost=[1.0]), {"p99_ttft": 0.5}, replications=4
        ).plot(),
    )
    yield "calibration", lambda: fs.calibrate(measured_points(), kv_capacity=120_000).plot()


def load_frame(workload: fs.Workload, server: fs.Server, tables: list[fs.PolicyTable]) -> object:
    """Latency and throughput of the tables along the load, as `load_curve` wants them."""
    import pandas as pd

    parts = []
    for load in (0.5, 0.7, 0.8, 0.9, 0.96, 1.02):
        offered = workload.at_load(load, server)
        runs = fs.simulate(offered, server, tables, horizon=900.0, warmup=150.0, replications=4, seed=11)
        frame = runs.summary().query("measure in ('mean_ttft', 'request_throughput')")
        behind = frame["policy"].map({policy: runs.verdict(policy) == "unstable" for policy in runs.policies})
        parts.append(frame.assign(arrival_rate=offered.total_arrival_rate, behind=behind))
    return pd.concat(parts)


def counted_queue(threshold: int, mean: float) -> np.ndarray:
    """The recursion itself, 20 000 cycles."""
    arrivals = np.random.default_rng(5).poisson(mean, 20_000)
    queue, counted = 0, []
    for arrived in arrivals.tolist():
        queue += arrived
        queue -= threshold if queue >= threshold else 0
        counted.append(queue)
    return np.array(counted)


def measured_points() -> dict[str, np.ndarray]:
    """300 iterations of a known server with 3 % noise."""
    rng = np.random.default_rng(3)
    time = fs.IterationTime.affine(0.009, 1.1e-5, 1.1e-5, 3.0e-7)
    decodes = np.where(rng.random(300) < 0.8, rng.integers(1, 200, 300), 0)
    prefill = np.where((rng.random(300) < 0.5) | (decodes == 0), rng.integers(16, 2048, 300), 0)
    kv = decodes * rng.integers(200, 2000, 300)
    attention = prefill**2 / 2.0
    seconds = time(prefill, decodes, kv, attention) * rng.normal(1.0, 0.03, 300)
    return {
        "n_tok": prefill + decodes,
        "batch_decode": decodes,
        "kv_tok": kv,
        "pre_attn": attention,
        "t_s": seconds,
    }


def draw(example: Callable[[], object]) -> Any:
    """The figure of one example, closed for pyplot."""
    from matplotlib import pyplot

    figure = example().get_figure()  # type: ignore[attr-defined]
    pyplot.close(figure)
    return figure


def what_it_says(figure: Any) -> list[dict[str, Any]]:
    """Texts and data of every axes of a figure: what has to stay when Matplotlib draws differently."""
    found = []
    for axes in figure.axes:
        legend = axes.get_legend()
        found.append(
            {
                "x": axes.get_xlabel(),
                "y": axes.get_ylabel(),
                "title": axes.get_title(),
                "legend": [] if legend is None else [text.get_text() for text in legend.get_texts()],
                "scales": [axes.get_xscale(), axes.get_yscale()],
                "lines": [data_of(line.get_xydata()) for line in axes.lines],
                "areas": [
                    data_of(area.get_paths()[0].vertices) for area in axes.collections if area.get_paths()
                ],
                "patches": [data_of(patch.get_path().vertices @ np.eye(2)) for patch in axes.patches],
            }
        )
    return found


def data_of(points: Any) -> list[float]:
    """A curve in five numbers: how many points, mean and spread of both coordinates, rounded."""
    known = np.ma.getdata(np.asarray(points, dtype=float))
    known = known[np.isfinite(known).all(axis=1)]
    if not len(known):
        return [0]
    return [len(known), *(float(f"{value:.4g}") for value in (*known.mean(axis=0), *known.std(axis=0)))]


def page(names: list[str]) -> str:
    """The gallery's page: every picture with the first sentence of its function."""
    parts = [
        "# Gallery\n\nEvery function of [`fluidsched.plots`](reference/plots.md), drawn by "
        "`python scripts/make_gallery.py` at the width of one column of a two-column page.\n"
    ]
    for name in names:
        sentence = (getattr(fs.plots, name).__doc__ or "").partition("\n")[0]
        parts.append(f"## {name}\n\n{sentence}\n\n![{name}](gallery/{name}.png)\n")
    return "\n".join(parts)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    said = {}
    for name, example in examples():
        figure = draw(example)
        figure.savefig(folder / f"{name}.png", dpi=DPI)
        said[name] = what_it_says(figure)
        print(folder / f"{name}.png")
    if folder == FOLDER:
        (folder.parent / "gallery.md").write_text(page(list(said)))
    (folder / "gallery.json").write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
