"""Objects show themselves: in a terminal, in Jupyter, as a frame, as LaTeX, as a picture; and they can be pickled."""

from __future__ import annotations

import importlib
import inspect
import pickle
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest

import fluidsched as fs
from fluidsched._display import Tabular, latex_table
from fluidsched.errors import InputError

EVIL = "a_<b>&"
"""A name of a type that HTML and LaTeX must escape."""

ROOMS = ("workload", "server", "fluid", "policy", "simulation", "bounds", "sweeps", "comparison", "measured")
LATER = ("tuning", "fleets", "planning", "recommendation")

# Made by no test here: interfaces, and results of long or foreign runs, which their own tests show.
ELSEWHERE = {"Tuning", "Candidate", "MeasuredComparison", "SweepSpec"}


def public_classes() -> dict[str, type]:
    """Classes among the public names and those of the rooms, interfaces and exceptions left out."""
    found = {name: getattr(fs, name) for name in fs.__all__}
    for room in (*ROOMS, *LATER):
        module = importlib.import_module(f"fluidsched.{room}")
        found |= {name: getattr(module, name) for name in module.__all__}
    return {
        name: value
        for name, value in found.items()
        if inspect.isclass(value) and not inspect.isabstract(value) and not issubclass(value, Exception)
    }


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One object of each kind, from a small system whose types have names that need escaping."""
    server = fs.Server(4000, fs.IterationTime.affine(0.05, 1e-4, 1e-3, 1e-5), name="small <server>")
    workload = fs.Workload(
        [fs.RequestType(EVIL, 2.0, 20, 6), fs.RequestType("long", 1.0, 60, 16)], name="two <types>"
    ).at_load(0.6, server)
    fluid = fs.solve_fluid(workload, server)
    wait = fs.compile_policy(fluid, "wait", overflow_probability=0.0)
    runs = fs.simulate(workload, server, [wait, fs.baselines.vllm()], horizon=60.0, replications=2, seed=1)
    program = fs.FluidProgram(workload, server)
    pools = [fs.Pool(server, 2.0, name="<pool>")]
    path = workload.sample(30.0, seed=1)
    fleet = fs.plan_capacity(workload.scaled(3.0), [server], cost=[1.0])
    rng = np.random.default_rng(1)
    decodes = rng.integers(1, 50, 60)
    kv = decodes * rng.integers(10, 500, 60)
    points = {"n_tok": decodes, "batch_decode": decodes, "kv_tok": kv, "pre_attn": 0 * kv}
    points["t_s"] = 0.01 + 1e-4 * decodes + 1e-6 * kv
    sweep = fs.sweep(
        {
            "base": {
                "server": server.to_dict(),
                "workload": workload.to_dict(),
                "horizon": 20.0,
                "replications": 1,
            },
            "grid": {"policy": ["vllm"]},
        },
        tmp_path_factory.mktemp("sweep") / "cells",
    )
    planned = fs.plan(workload, server, horizon=60.0, replications=2)
    asked = fs.UserSequences.draw(workload, 3, think_mean=1.0, turns=2)
    made = [
        asked, fs.simulate_closed(asked, server, [wait, fs.baselines.vllm()], horizon=60.0),
        server, workload, fluid, wait, runs, program, path, fleet, sweep,
        workload.types[0], server.iteration_time, pools[0],
        fs.stability_region(workload, server),
        fs.fluid.sweep_load(program, largest=2.0),
        fs.fluid.solve_pools(workload, pools),
        fs.solve_fair(workload.at_load(1.5, server), server, 1.0),
        fs.solve_transient(workload, server, [3.0, 5.0, 2.0], step=60.0),
        fs.verify_capacity(fleet, {"p99_ttft": 60.0}, replications=2, horizon=60.0),
        fs.policy.wait_curve(fluid, block_iterations=[1, 2, 4]),
        fs.policy.segment_curve(fluid, block_iterations=1, segment_counts=[1, 2]),
        fs.policy.reach_curve(workload, server),
        planned, planned.recommendation,
        fs.adapt(wait, path, fluid),
        fs.compare(runs, bound=fluid),
        fs.fluid_trajectory(workload, server, fs.baselines.vllm(), iterations=50),
        fs.simulation.policy_timeline(path, server, wait, horizon=10.0),
        fs.calibrate(points, "paper", kv_capacity=1e5),
    ]  # fmt: skip
    return {type(one).__name__: one for one in made}


class Tags(HTMLParser):
    """Checks that every tag is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("br", "col"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_public_class_with_a_table_shows_it_and_is_tried_here(objects: dict[str, Any]) -> None:
    """A new class with `to_frame` has HTML and LaTeX from `Tabular`, and an object of it stands above."""
    tables = {name: kind for name, kind in public_classes().items() if hasattr(kind, "to_frame")}
    assert not [name for name, kind in tables.items() if not issubclass(kind, Tabular)]
    assert not set(tables) - set(objects) - ELSEWHERE


def test_texts(objects: dict[str, Any]) -> None:
    """A terminal shows words, not addresses nor walls of numbers, and the same after a round trip through pickle."""
    for name, one in objects.items():
        text = repr(one)
        assert " object at 0x" not in text, name
        assert max(map(len, text.splitlines())) <= 200, name
        assert repr(pickle.loads(pickle.dumps(one))) == text, name


def test_html_is_whole_and_escaped(objects: dict[str, Any]) -> None:
    shown = 0
    for name, one in objects.items():
        if not hasattr(one, "_repr_html_"):
            continue
        page = one._repr_html_()
        assert "<b>" not in page, name
        shown += EVIL in Tags(page).text
    assert shown >= 5  # names did pass through


def test_latex(objects: dict[str, Any]) -> None:
    """Rows of one width between the rules of booktabs, names escaped."""
    for name, one in objects.items():
        if not isinstance(one, Tabular):
            continue
        assert isinstance(one.to_frame(), pd.DataFrame), name
        lines = one.to_latex().splitlines()
        assert lines[0].startswith(r"\begin{tabular}{")
        assert lines[-1] == r"\end{tabular}"
        rows = [line for line in lines if line.endswith(r" \\")]
        columns = len(lines[0]) - len(r"\begin{tabular}{}")
        assert {row.replace(r"\&", "").count("&") for row in rows} == {columns - 1}, name
        assert EVIL not in one.to_latex()
    assert r"a\_\textless{}b\textgreater{}\&" in objects["FluidSolution"].to_latex(
        columns=["type", "bid_price"]
    )


def test_latex_numbers_and_captions() -> None:
    """Dashes for nothing, powers of ten, digits as asked; a caption makes a table of it."""
    frame = pd.DataFrame({"x": [np.nan, np.inf, -0.00001234, 1234567.0], "n": [1, -2, 3, 40000]})
    text = latex_table(frame, digits=2, caption="Rates", label="tab:r")
    assert [line for line in text.splitlines() if line.endswith(r" \\")][1:] == [
        r"-- & 1 \\",
        r"$\infty$ & $-$2 \\",
        r"$-1.2 \cdot 10^{-5}$ & 3 \\",
        r"1,234,567 & 40,000 \\",
    ]
    assert text.startswith("\\begin{table}\n\\centering\n\\caption{Rates}\n\\label{tab:r}\n")
    with pytest.raises(InputError, match="columns must be among x, n; got y"):
        latex_table(frame, columns=["y"])


def test_plots_draw_where_they_are_told(objects: dict[str, Any]) -> None:
    """`.plot(ax=...)` returns these axes, with something on them."""
    from matplotlib.figure import Figure

    arguments = {"StabilityRegion": (EVIL, "long")}
    drawn = 0
    for name, one in objects.items():
        if hasattr(one, "plot"):
            axes = Figure(layout="constrained").add_subplot()
            assert one.plot(*arguments.get(name, ()), ax=axes) is axes, name
            assert axes.has_data(), name
            drawn += 1
    assert drawn >= 15
