"""Breakpoints along a line of rates, ranging, and the program in other tools' formats."""

from __future__ import annotations

from pathlib import Path

import highspy
import numpy as np
import pytest
import scipy.optimize
from fluid_cases import logarithmic, servers, workloads
from hypothesis import assume, given, settings

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.fluid._highs import new_highs
from fluidsched.fluid.export import column_frame, column_names, row_frame, to_highs, write_program
from fluidsched.fluid.sensitivity import ranging, sweep_load, sweep_rates


def three_types() -> fs.FluidProgram:
    types = [
        fs.RequestType("chat", 8.0, 512, 128),
        fs.RequestType("summarise", 5.0, 4000, 200),
        fs.RequestType("look up", 3.0, 1000, 10),
    ]
    return fs.FluidProgram(fs.Workload(types), fs.catalog.server("a100", "llama-2-7b"))


@settings(max_examples=25)
@given(workloads(), servers(), logarithmic(1.5, 50.0))
def test_sweep_is_exact_between_its_points(workload: fs.Workload, server: fs.Server, largest: float) -> None:
    """The value interpolated between breakpoints is the optimum anywhere; it is concave; 1 is where it bends."""
    program = fs.FluidProgram(workload, server)
    assume(program.solve().load.max() > 0)
    sweep = sweep_load(program, largest)
    rate = workload.at_load(1.0, server).arrival_rate
    for x in (0.3, 0.99, 1.2, largest * 0.7, largest):
        direct = program.solve(rate * x).objective_value
        assert float(sweep.value_at(x)) == pytest.approx(direct, rel=1e-8)
    slopes = np.diff(sweep.objective_value) / np.diff(sweep.parameter)
    assert np.all(np.diff(slopes) < 1e-7 * slopes[0])
    assert sweep.parameter[0] == 0.0
    assert sweep.parameter[-1] == largest
    assert np.any(np.isclose(sweep.parameter, 1.0, rtol=1e-7))


def test_overload_refuses_by_bid_price() -> None:
    """As the mix grows past its boundary the dearest type is rationed first; breakpoints are its milestones."""
    sweep = sweep_load(three_types(), 10.0)
    np.testing.assert_allclose(sweep.parameter[:2], [0.0, 1.0], rtol=1e-12)
    decisions = [solution.decision for solution in sweep.solutions]
    assert decisions[1] == ("admitted", "admitted", "admitted")
    assert decisions[2][1] == "refused"
    assert decisions[-1][0] == "rationed"
    assert sweep.admitted_rate[-1, 1] == pytest.approx(0.0, abs=1e-9)
    text = repr(sweep)
    assert "summarise refused" in text
    frame = sweep.to_frame()
    assert len(frame) == 3 * len(sweep.parameter)
    assert {"load", "objective_value", "iteration_time_s", "bid_price"} <= set(frame.columns)


def test_sweep_between_any_two_rates() -> None:
    """A line that trades one type for another; its ends are the ends given, and wrong arguments are named."""
    program = three_types()
    sweep = sweep_rates(program, [20.0, 0.0, 0.0], [0.0, 4.0, 0.0])
    assert sweep.parameter_name == "t"
    np.testing.assert_array_equal(sweep.arrival_rate[[0, -1]], [[20, 0, 0], [0, 4, 0]])
    middle = program.solve([10.0, 2.0, 0.0]).objective_value
    assert float(sweep.value_at(0.5)) == pytest.approx(middle, rel=1e-9)
    with pytest.raises(InputError, match="lie between"):
        sweep.value_at(1.5)
    with pytest.raises(InputError, match="arrival_rate"):
        sweep_rates(program, [1.0], [1.0])
    with pytest.raises(InputError, match="largest"):
        sweep_load(program, 0.0)
    silent = fs.FluidProgram(program.model.workload.scaled(0.0), program.model.server)
    with pytest.raises(InputError, match="demand"):
        sweep_load(silent)


def test_floors_bend_the_sweep_too() -> None:
    """With a floor the refused type keeps its share, until the floors alone are too much."""
    base = three_types().model
    program = fs.FluidProgram(base.workload, base.server, fairness_floor=0.1)
    sweep = sweep_load(program, 5.0)
    for x in (0.5, 2.0, 4.5):
        rate = base.workload.at_load(x, base.server).arrival_rate
        assert float(sweep.value_at(x)) == pytest.approx(program.solve(rate).objective_value, rel=1e-9)


@pytest.mark.parametrize("scale", [0.2, 1.0])
def test_ranging_says_how_far_one_number_may_move(scale: float) -> None:
    """Inside its range a reward changes no admitted rate and a rate no price; just outside, one of them does."""
    program = three_types()
    model = program.model
    rate = model.workload.arrival_rate * scale
    fluid = program.solve(rate)
    frame = ranging(fluid)
    low, high = frame[["arrival_rate_low", "arrival_rate_high"]].to_numpy().T
    for j in range(3):
        for edge, step in ((low[j], 1e-3), (high[j], -1e-3)):
            if not 0 < edge < np.inf:
                continue
            inside, outside = rate.copy(), rate.copy()
            inside[j], outside[j] = edge * (1 + step), edge * (1 - step)
            np.testing.assert_allclose(
                program.solve(inside).bid_price, fluid.bid_price, rtol=1e-6, atol=1e-12
            )
            assert not np.allclose(program.solve(outside).bid_price, fluid.bid_price, rtol=1e-6, atol=1e-12)
    for j, row in frame.iterrows():
        for edge, step in ((row["reward_low"], 1e-3), (row["reward_high"], -1e-3)):
            if not 0 < edge < np.inf:
                continue
            answers = []
            for sign in (1, -1):
                reward = np.array(model.reward)
                reward[j] = edge * (1 + sign * step)
                answers.append(
                    fs.solve_fluid(model.workload.with_rates(rate), model.server, reward).admitted_rate
                )
            np.testing.assert_allclose(answers[0], fluid.admitted_rate, rtol=1e-6, atol=1e-9)
            assert not np.allclose(answers[1], fluid.admitted_rate, rtol=1e-6, atol=1e-9)


def test_frames_are_the_program() -> None:
    """Solving from the labelled frames alone gives the same optimum."""
    fluid = three_types().solve()
    rows, columns = row_frame(fluid.model), column_frame(fluid.model)
    assert rows.columns[:-1].tolist() == list(column_names(fluid.model)) == columns.index.tolist()
    assert rows.index.tolist() == ["time[0]", "time[1]", "kv", "batch"]
    witness = scipy.optimize.linprog(
        -columns["reward"],
        rows.drop(columns="limit"),
        rows["limit"],
        bounds=columns[["lower", "upper"]].to_numpy(),
        method="highs",
    )
    assert -witness.fun == pytest.approx(fluid.objective_value, rel=1e-7)


@pytest.mark.parametrize("ending", [".lp", ".mps"])
def test_written_files_are_the_program(ending: str, tmp_path: Path) -> None:
    """A file read back by HiGHS has the names, and the optimum and the duals of ours."""
    program = three_types()
    rate = program.model.workload.arrival_rate * 2
    fluid = program.solve(rate)
    path = tmp_path / f"program{ending}"
    write_program(fluid.model, path, rate)
    text = path.read_text()
    assert "admitted_rate_look_up" in text
    assert "kv" in text
    highs = new_highs()
    assert highs.readModel(str(path)) == highspy.HighsStatus.kOk
    highs.run()
    sign = 1.0 if highs.getLp().sense_ == highspy.ObjSense.kMaximize else -1.0
    assert sign * highs.getInfo().objective_function_value == pytest.approx(fluid.objective_value, rel=1e-7)
    duals = sign * np.array(highs.getSolution().row_dual)
    np.testing.assert_allclose(duals, fluid.row_dual, rtol=1e-6, atol=1e-9)


def test_unwritable_formats_are_refused(tmp_path: Path) -> None:
    """Only .lp and .mps; nothing is left behind."""
    with pytest.raises(InputError, match="ending"):
        write_program(three_types().model, tmp_path / "program.txt")
    assert not list(tmp_path.iterdir())


def test_types_with_clashing_plain_names_stay_apart() -> None:
    """Names that become equal in a file format are numbered."""
    types = [fs.RequestType("a b", 1.0, 10, 10), fs.RequestType("a_b", 1.0, 20, 20)]
    program = fs.FluidProgram(fs.Workload(types), fs.Server(1000, fs.IterationTime.paper(0.01, 1e-6)))
    names = to_highs(program.model).getLp().col_names_
    assert len(set(names)) == 3


def test_plot() -> None:
    """One line per type through the breakpoints, the boundary marked, units on the axes."""
    from matplotlib import pyplot

    sweep = sweep_load(three_types(), 4.0)
    axes = sweep.plot()
    lines = {line.get_label(): line for line in axes.lines if not str(line.get_label()).startswith("_")}
    assert list(lines) == ["chat", "summarise", "look up"]
    np.testing.assert_array_equal(lines["chat"].get_ydata(), sweep.admitted_rate[:, 0])
    assert axes.get_xlabel() == "load (1: the fluid boundary)"
    assert axes.get_ylabel() == "admitted rate (req/s)"
    pyplot.close(axes.figure)
