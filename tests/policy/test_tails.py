"""The tail of what independent residents hold: closed forms, convolutions by FFT as witnesses, and draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest, poisson

import fluidsched as fs
from fluidsched.policy import capped, compile_policy
from fluidsched.policy.problem import Problem
from fluidsched.policy.profiles import normal_quantile
from fluidsched.policy.tails import Held, negligible, resident_moments, resident_transform, tail_of

TIME = fs.IterationTime.affine(0.01, 1e-6, 1e-6, 1e-9)


@pytest.mark.parametrize("level", [5, 40, 60, 80, 99])
def test_binomial_tails(level):
    """100 tosses: P(S > x) within 1e-9 relative, from near 1 down to 8e-31, and below Chernoff's bound."""
    found = tail_of(lambda z: 100 * np.log((1 + np.exp(z)) / 2), level, 50.0, 5.0, 100.0)
    assert found.probability == pytest.approx(binom.sf(level, 100, 0.5), rel=1e-9)
    assert found.probability <= found.chernoff


@pytest.mark.parametrize("level", [30.5, 70, 200])
def test_poisson_tails(level):
    found = tail_of(lambda z: 30 * np.expm1(z), level, 30.0, math.sqrt(30), 1e9)
    assert found.probability == pytest.approx(poisson.sf(math.floor(level), 30), rel=1e-9)


def test_what_cannot_happen_has_probability_zero():
    assert tail_of(lambda z: 5 * z, 5, 5.0, 0.0, 5.0).probability == 0.0
    assert tail_of(lambda z: 5 * z, 4, 5.0, 0.0, 5.0).probability == 1.0


def test_a_cap_s_overflow_is_the_convolution_of_its_residents():
    """86 in service on the Azure conversations, convolved by FFT: 1.135 %, where the normal law says 1 %."""
    server = fs.catalog.server("a100-80gb", "llama-2-7b")
    fluid = fs.solve_fluid(fs.workloads.azure_conv().at_load(0.8, server), server)
    problem = Problem.of(fluid, 0.01)
    one = np.zeros(40_000)
    for rate, request_type in zip(problem.rate, problem.workload.types, strict=True):
        p, o, w = request_type.law.atoms()
        np.add.at(one, p, rate * w)
        np.add.at(one, p + o, -rate * w)
    one = np.cumsum(one) / np.cumsum(one).sum()
    law = np.fft.irfft(np.fft.rfft(one, 1 << 21) ** 86, 1 << 21)
    witness = float(law[int(problem.capacity) + 1 :].sum())
    found = capped.overflow(problem, 86).probability
    assert found == pytest.approx(witness, rel=1e-8)
    assert found == pytest.approx(0.01135, abs=1e-5)
    table = compile_policy(fluid, "capped")
    assert table.max_in_service == 85
    assert table.certificate["cap"]["real"] == pytest.approx(86.66, abs=0.01)
    line = table.certificate["overflow_probability"]
    assert line["value"] == pytest.approx(capped.overflow(problem, 85).probability, rel=1e-12)
    assert line["value"] <= line["target"] == 0.01 < line["chernoff"]


def test_cells_are_convolved_whatever_their_laws():
    """A product law and a joint one, stages and padding by hand: every cell's law written out and convolved."""
    product = fs.RequestType("a", 1.0, fs.lengths.uniform(3, 6), fs.lengths.uniform(1, 5))
    joint = fs.RequestType("b", 1.0, lengths=fs.lengths.joint([2, 9, 4], [2, 4, 7], [0.5, 0.3, 0.2]))
    fluid = fs.solve_fluid(fs.Workload([product, joint]), fs.Server(1e6, TIME, block_size=4))
    problem = Problem.of(fluid, 0.01)
    kind, stage, count = np.array([0, 0, 1]), np.array([1, 3, 2]), np.array([2.0, 3.0, 2.0])
    held = Held(problem, kind, stage, problem.padding - 1, count)
    law = np.ones(1)
    for j, s, n in zip(kind.tolist(), stage.tolist(), count.tolist(), strict=True):
        cell = np.zeros(40)
        for p, o, w in zip(*problem.workload.types[j].law.atoms(), strict=True):
            cell[p + s + 2 if o > s else 0] += w
        for _ in range(int(n)):
            law = np.convolve(law, cell)
    values = np.arange(len(law))
    mean = float(law @ values)
    deviation = math.sqrt(law @ (values - mean) ** 2)
    for level in (20, 45, 60):
        found = tail_of(held, level, mean, deviation, held.largest)
        assert found.probability == pytest.approx(law[level + 1 :].sum(), rel=1e-9)
    assert held.largest == values[law > 0.0].max()


@pytest.mark.parametrize("kind", ["wait", "gated"])
def test_tables_are_compiled_again_where_the_normal_law_is_too_short(kind):
    """Few residents and rare long prompts: z is raised until the actual tail is at most δ."""
    prompts = fs.lengths.empirical([100, 6000], [0.97, 0.03])
    workload = fs.Workload([fs.RequestType("a", 8.0, prompts, fs.lengths.uniform(1, 20))])
    fluid = fs.solve_fluid(workload, fs.Server(25_000, fs.IterationTime.affine(0.01, 1e-5, 1e-4, 1e-8)))
    table = compile_policy(fluid, kind, overflow_probability=0.002)
    assert table.certificate["memory"]["z"] > normal_quantile(0.002)
    assert 0.0 < table.certificate["overflow_probability"]["value"] <= 0.002


def test_drawn_blocks_overflow_as_often_as_stated():
    """Full entries of a WAIT block at every stage, drawn 20 000 times; null: the stated probability, error 1e-4."""
    law = fs.lengths.joint([50, 400, 1500], [5, 30, 12], [0.6, 0.3, 0.1])
    fluid = fs.solve_fluid(fs.Workload([fs.RequestType("a", 30.0, lengths=law)]), fs.Server(60_000, TIME))
    table = compile_policy(fluid, "wait", overflow_probability=0.05, block_iterations=4)
    stated = table.certificate["overflow_probability"]["value"]
    assert stated > 0.01
    rng = np.random.default_rng(2)
    n, draws, worst = int(table.types[0].threshold), 20_000, 0
    for r in range(4):
        held = np.zeros(draws)
        for stage in range(r, 30, 4):
            p, o = law.sample(rng, draws * n)
            held += np.where(o > stage, p + stage, 0).reshape(draws, n).sum(axis=1)
        worst = max(worst, int((held > 60_000).sum()))
    assert binomtest(worst, draws, stated).pvalue > 1e-4


def test_moments_by_type_are_those_of_all() -> None:
    """Weighed by how many residents are of each type they add up to the transform; a product law among them."""
    product = fs.RequestType("a", 2.0, fs.lengths.uniform(3, 30), fs.lengths.uniform(1, 50))
    joint = fs.RequestType("b", 1.0, lengths=fs.lengths.joint([2, 9, 4], [2, 4, 7], [0.5, 0.3, 0.2]))
    problem = Problem.of(fs.solve_fluid(fs.Workload([product, joint]), fs.Server(1e6, TIME)), 0.01)
    weight, transform = problem.rate * problem.workload.iterations, resident_transform(problem)[0]
    for theta in (0.01, 0.3):
        alone = [transform_of_type(problem, j, theta) for j in range(2)]
        moments = resident_moments(problem, theta)
        assert moments[0] / moments[1] == pytest.approx(alone[0] / alone[1], rel=1e-12)
        assert np.exp(transform(theta)) == pytest.approx(float(weight @ alone) / weight.sum(), rel=1e-12)


def transform_of_type(problem: Problem, j: int, theta: float) -> float:
    """E e^{θX} of a resident of the type, added up iteration by iteration."""
    p, o, w = problem.workload.types[j].law.atoms()
    total = sum(
        weight * np.exp(theta * (prompt + np.arange(output))).sum()
        for prompt, output, weight in zip(p.tolist(), o.tolist(), w.tolist(), strict=True)
    )
    return float(total) / float(problem.workload.iterations[j])


def test_cells_multiplied_together_are_those_taken_one_by_one() -> None:
    """A type at thirty stages, more than are multiplied before a logarithm is taken, beside one of another count."""
    law = fs.lengths.joint([200, 900, 40], [12, 30, 31], [0.5, 0.3, 0.2])
    types = [fs.RequestType(name, 1.0, lengths=law) for name in "ab"]
    problem = Problem.of(fs.solve_fluid(fs.Workload(types), fs.Server(1e6, TIME)), 0.01)
    kind, stage = np.repeat([0, 1], 30), np.tile(np.arange(30), 2)
    count = np.where(kind == 0, 2.0, 5.0)
    held = Held(problem, kind, stage, 0, count)
    alone = [Held(problem, kind[i : i + 1], stage[i : i + 1], 0, count[i : i + 1]) for i in range(60)]
    for z in (1e-4, 1e-4 + 3e-4j, 2e-4 - 1e-2j):
        assert np.exp(held(z)) == pytest.approx(np.exp(sum(one(z) for one in alone)), rel=1e-9)


@pytest.mark.parametrize(
    ("level", "is_found"), [(2_900, False), (3_700, False), (5_200, False), (5_400, True)]
)
def test_what_bernstein_calls_negligible_has_a_bound_of_zero(level: int, is_found: bool) -> None:
    """30 000 rare events: where the inequality alone says so, Chernoff's exponent is below that of any float."""
    trials, p = 30_000, 0.1
    found = negligible(level, trials * p, trials * p * (1 - p), 1.0)
    share = level / trials
    exponent = -trials * (share * math.log(share / p) + (1 - share) * math.log((1 - share) / (1 - p)))
    assert (found is not None) == is_found
    if found is not None:
        assert found.probability == found.chernoff < 1e-307
        assert exponent < -746.0


def test_far_beyond_the_mean_the_bound_stands_for_the_probability() -> None:
    """Regression: 820 nats beyond, where floats end, the integral was zero and its sum never small beside it."""
    tail = tail_of(lambda z: 10_000 * np.log((1 + np.exp(z)) / 2), 9_900, 5_000.0, 50.0, 10_000.0)
    assert tail.probability == tail.chernoff < 1e-100
    assert binom.logsf(9_900, 10_000, 0.5) < math.log(tail.chernoff)
