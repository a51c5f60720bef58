"""Compiled look-ahead: its headroom against drawn residents, its promises against runs of the reference engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import binom

import fluidsched as fs
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.policy import compile_policy
from fluidsched.policy.lookahead import equal_slices, forecast_error, predicted_error
from fluidsched.policy.problem import Problem
from fluidsched.simulation.reference import run_reference

SERVER = fs.Server(3_000, fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0))


def _fluid(load: float, server: fs.Server = SERVER) -> Any:
    """Prompts 5..25; outputs geometric, at most 200, and a second type of short ones."""
    lengths = fs.lengths
    types = [
        fs.RequestType(
            "long",
            1.0,
            prompt_tokens=lengths.uniform(5, 25),
            output_tokens=lengths.geometric(40.0, maximum=200),
        ),
        fs.RequestType(
            "short", 0.5, prompt_tokens=lengths.uniform(5, 25), output_tokens=lengths.uniform(2, 20)
        ),
    ]
    workload = fs.Workload(types)
    return fs.solve_fluid(workload.at_load(load, server), server)


def _stationary(problem: Problem, rng: np.random.Generator, draws: int) -> tuple[Any, Any, Any]:
    """Prompt, output and stage of residents seen at a random iteration: by size, then any stage of it."""
    count = (draws * problem.rate / problem.rate.sum()).astype(int)
    lengths = [t.law.sample(rng, n) for t, n in zip(problem.workload.types, count, strict=True)]
    prompt, output = (np.concatenate(parts) for parts in zip(*lengths, strict=True))
    stage = np.concatenate([np.arange(o) for o in output])
    return np.repeat(prompt, output), np.repeat(output, output), stage


def test_error_of_the_forecast_is_that_of_drawn_residents() -> None:
    """b and v of the law against 1.5 million drawn residents, at iterations ahead 1, 20 and 100: within 3 %."""
    problem = Problem.of(_fluid(0.8), 0.01)
    profile = problem.mean_profile
    slices = equal_slices(problem.rate @ profile.present / problem.rate.sum())
    ahead, mean, square = forecast_error(profile, problem.rate, slices)
    prompt, output, stage = _stationary(problem, np.random.default_rng(1), 50_000)
    lengths = np.array(slices)
    for u in (1, 20, 100):
        i = int(np.searchsorted(ahead, u))
        left = (lengths > stage[:, None]).sum(axis=1)
        later = (lengths > (stage + u)[:, None]).sum(axis=1)
        survive = np.where(left > 0, later / np.maximum(left, 1), 0.0)
        error = (prompt + stage + u) * ((output > stage + u) - survive)
        scale = np.sqrt(square[i])
        assert abs(error.mean() - mean[i]) < 0.03 * scale
        assert_allclose((error**2).mean(), square[i], rtol=0.03)


def test_variance_is_that_of_the_future_memory_where_the_law_is_known() -> None:
    """One type whose outputs are equally likely lengths: b = 0, and v is V(u) of the module's text, summed by hand."""
    outputs = (4, 9, 9, 30)
    law = fs.lengths.empirical(outputs)
    workload = fs.Workload([fs.RequestType("a", 2.0, prompt_tokens=7, output_tokens=law)])
    problem = Problem.of(fs.solve_fluid(workload, SERVER), 0.01)
    assert equal_slices(problem.mean_profile.present[0], 4) == outputs
    ahead, mean, square = forecast_error(problem.mean_profile, problem.rate, outputs)
    tail = np.array([np.mean(np.array(outputs) > s) for s in range(200)])
    for i, u in enumerate(ahead.tolist()):
        expected = sum(
            (7 + s + u) ** 2 * tail[s + u] * (1 - tail[s + u] / tail[s]) for s in range(30)
        ) / np.mean(outputs)
        assert_allclose(square[i], expected, atol=1e-9)
        assert_allclose(mean[i], 0.0, atol=1e-12)


def test_error_of_predictions_is_that_of_drawn_residents() -> None:
    """The closed sums over stages against stage-by-stage forecasts, 300 requests with beliefs off both ways."""
    rng = np.random.default_rng(2)
    prompt, output = rng.integers(1, 30, 300), rng.integers(1, 60, 300)
    believed = np.maximum(1, (output * rng.lognormal(0.0, 0.7, 300)).astype(int))
    ahead, mean, square = predicted_error(prompt, output, believed, padding=2)
    p, o, b = (np.repeat(x, output) for x in (prompt, output, believed))
    stage = np.concatenate([np.arange(n) for n in output])
    for i, u in enumerate(ahead.tolist()):
        there, forecast = o > stage + u, b > stage + u
        error = (p + 2 + stage + u) * (there.astype(float) - forecast)
        assert_allclose([mean[i], square[i]], [error.mean(), (error**2).mean()], atol=1e-9)


def _overflows(table: Any, fluid: Any, seed: int, prediction: Any = None) -> tuple[int, int]:
    """Iterations that preempted, of all, in one run in overload so that memory is full."""
    path = fluid.workload.scaled(2.5).sample(1_500.0, seed)
    if prediction is not None:
        path = path.with_predictions(prediction, seed=seed)
    preempting = 0
    iterations = 0

    def count(batch: Any) -> None:
        nonlocal preempting, iterations
        iterations += 1
        preempting += bool(batch.preempted)

    run_reference(path, fluid.server, table, horizon=1_500.0, on_iteration=count)
    return preempting, iterations


@pytest.mark.parametrize("mode", ["law", "predicted"])
def test_overflows_are_no_more_frequent_than_promised(mode: str) -> None:
    """Null: P(overflow per iteration) ≤ δ = 0.05, counting every 40th iteration as one draw (lives are 40 long).

    Rejected with error rate 1e-3. Memory is full throughout: 2.5 times the demand is offered. The plain rule,
    without headroom, overflows more often than δ."""
    delta, fluid = 0.05, _fluid(0.6)
    prediction = fs.predictions.lognormal(0.5) if mode == "predicted" else None
    table = compile_policy(
        fluid,
        "lookahead",
        mode="law" if prediction is None else "known",
        prediction=prediction,
        overflow_probability=delta,
    )
    preempting, iterations = _overflows(table, fluid, 3, prediction)
    draws = iterations // 40
    assert preempting / iterations <= binom.isf(1e-3, draws, delta) / draws
    plain, _ = _overflows(fs.baselines.vllm(), fluid, 3)
    assert plain > delta * iterations


def test_true_lengths_and_longest_reserves_never_overflow() -> None:
    """`known` and `reserve` with δ = 0: certain, headroom 0 or the longest output, and nobody is preempted."""
    fluid = _fluid(0.15)
    for mode, headroom in (("known", 0.0), ("reserve", 200.0)):
        table = compile_policy(fluid, "lookahead", mode=mode, overflow_probability=0.0)
        assert table.lookahead.headroom_tokens == headroom
        assert table.certificate["memory"]["guarantee"] == "certain"
        assert _overflows(table, fluid, 4)[0] == 0
    quantile = compile_policy(fluid, "lookahead", mode="reserve", overflow_probability=0.1)
    assert quantile.lookahead.headroom_tokens < 200.0
    assert quantile.certificate["memory"]["guarantee"] == "probability"
    law = compile_policy(_fluid(0.5), "lookahead").certificate
    assert {law[name]["guarantee"] for name in ("memory", "overflow_probability", "headroom")} == {
        "approximation"
    }


def test_tables_survive_files_and_say_what_they_are() -> None:
    table = compile_policy(_fluid(0.5), "lookahead")
    assert fs.PolicyTable.from_dict(table.to_dict()) == table
    assert table.lookahead.mode == "law"
    assert len(table.lookahead.lengths) == 16


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"mode": "guess"}, "mode"),
        ({"block_iterations": 2}, "block_iterations"),
        ({"mode": "law", "prediction": fs.predictions.exact()}, "prediction"),
        ({"rate_error": 0.1}, "rate_error"),
    ],
)
def test_arguments_that_make_no_sense_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=name):
        compile_policy(_fluid(0.5), "lookahead", **options)


def test_no_room_is_said() -> None:
    """Memory for two requests leaves nothing beyond the headroom; near the boundary too little is carried."""
    small = fs.Server(300, fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0))
    with pytest.raises(InfeasibleError) as caught:
        compile_policy(_fluid(0.2, small), "lookahead", overflow_probability=1e-6)
    assert caught.value.reason == "memory"
    with pytest.raises(InfeasibleError) as caught:
        compile_policy(_fluid(0.9), "lookahead", overflow_probability=0.001)
    assert caught.value.reason == "time"
    with pytest.raises(InputError, match="mode"):
        compile_policy(_fluid(0.5), "capped", mode="law")
