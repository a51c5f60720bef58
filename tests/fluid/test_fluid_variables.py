"""The program in cvxpy: the whole program, objectives and constraints of one's own, contradictions named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fluidsched as fs
from fluidsched.errors import InfeasibleError, InputError, SolverError
from fluidsched.fluid import FluidVariables, fluid_variables


def program(**asked: Any) -> fs.FluidProgram:
    types = [
        fs.RequestType("chat", 40.0, 300, 200),
        fs.RequestType("long prompts", 9.0, 3000, 20),
        fs.RequestType("long answers", 5.0, 50, 1500),
    ]
    iteration_time = fs.IterationTime.two_piece(0.01, 2e-5, 256, 4e-5, 1e-7, 1e-9)
    server = fs.Server(60_000, iteration_time, max_batch_size=64, token_budget=2048)
    return fs.FluidProgram(fs.Workload(types), server, **asked)


def variables(**asked: Any) -> FluidVariables:
    return fluid_variables(program(**asked).model)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"max_iteration_time": 0.02},
        {"fairness_floor": [0.01, 0.2, 0.0]},
        {"objective": "output_tokens", "max_iteration_time": 0.02, "fairness_floor": 0.05},
    ],
)
def test_the_whole_program(asked: dict[str, Any]) -> None:
    """Maximising the program's reward over the variables is the fluid program; multipliers agree in sign."""
    fluid = variables(**asked)
    best = fluid.maximise(fluid.model.reward @ fluid.admitted_rate)
    solution = program(**asked).solve()
    assert best.value == pytest.approx(solution.objective_value, rel=1e-7)
    np.testing.assert_allclose(best.admitted_rate, solution.admitted_rate, rtol=1e-6, atol=1e-6)
    assert max(best.violation.values()) < 1e-7
    for name, dual in solution.dual.items():
        assert (best.dual[name] > 1e-9) == (dual > 1e-9)
    assert fluid.model.load(best.admitted_rate).max() <= 1 + 1e-7


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_fair_utilities(alpha: float) -> None:
    """The cone solver on the same utility comes to the rates of `solve_fair`."""
    fluid = variables(objective="output_tokens")
    weights = [1.0, 2.0, 0.5]
    best = fluid.maximise(fluid.utility(alpha, weights))
    model = fluid.model
    fair = fs.solve_fair(model.workload, model.server, alpha, "output_tokens", weights=weights)
    assert best.value == pytest.approx(fair.utility, rel=1e-5)
    np.testing.assert_allclose(best.admitted_rate, fair.admitted_rate, rtol=5e-3, atol=1e-6)


def test_constraints_of_ones_own() -> None:
    """Kept, and with a multiplier under their own name."""
    fluid = variables()
    chat, answers = fluid.rate("chat"), fluid.rate("long answers")
    free = fluid.maximise(fluid.utility())
    tied = fluid.maximise(fluid.utility(), {"as many answers as chats": chat == answers})
    assert tied.admitted_rate[0] == pytest.approx(tied.admitted_rate[2], rel=1e-5)
    assert tied.value < free.value
    assert tied.violation["as many answers as chats"] < 1e-5
    assert tied.dual["as many answers as chats"] != 0.0
    # A limit on u is a limit on the iteration time.
    slow = fluid.maximise(fluid.utility(), {"slow iterations": fluid.iteration_rate >= 60.0})
    assert slow.iteration_rate >= 60.0 * (1 - 1e-5)


def test_contradictions_are_irreducible() -> None:
    """Only the constraints that contradict are named, the program's own among them, with what they say."""
    fluid = variables()
    chat, prompts = fluid.rate("chat"), fluid.rate("long prompts")
    mine = {
        "some chat": chat >= 0.1,
        "many prompts": prompts >= 8.9,
        "few answers": fluid.admitted_rate[2] <= 1,
    }
    with pytest.raises(InfeasibleError) as caught:
        fluid.maximise(fluid.utility(), mine)
    text = str(caught.value)
    assert "'many prompts'" in text
    assert "some chat" not in text
    assert "few answers" not in text
    assert "'demand'" not in text
    assert "time" in text
    with pytest.raises(InfeasibleError) as caught:
        fluid.maximise(fluid.utility(), {"a": chat >= 2 * prompts + 1, "b": prompts >= chat, "c": chat >= 0})
    text = str(caught.value)
    assert "'a'" in text
    assert "'b'" in text
    assert "'c'" not in text
    assert "'kv'" not in text


def test_wrong_input_is_named() -> None:
    """Labels of the program, unknown types, objectives that are not concave or have no maximum."""
    import cvxpy as cp

    fluid = variables()
    with pytest.raises(InputError, match="the label 'kv'"):
        fluid.maximise(fluid.utility(), {"kv": fluid.rate("chat") >= 0})
    with pytest.raises(InputError, match="'long prompts'"):
        fluid.rate("short prompts")
    with pytest.raises(InputError, match="concave"):
        fluid.maximise(cp.sum_squares(fluid.admitted_rate))
    with pytest.raises(InputError, match="alpha"):
        fluid.utility(-1.0)
    with pytest.raises(SolverError, match="unbounded"):
        fluid.maximise(cp.Variable())
    assert "3 types" in repr(fluid)
