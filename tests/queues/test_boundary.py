"""Boundary queues: Lundberg exponents, exact first passage against independent methods, buffers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fluidsched.errors import InputError
from fluidsched.queues import exact_buffer, first_passage_probability, lundberg_buffer, lundberg_exponent

EXPONENTS = {
    (10, 4, 0.3): 0.871061,
    (21, 9, 0.3): 1.104776,
    (100, 35, 0.3): 0.451427,
    (66, 43, 0.619): 0.282819,
    (20, 19, 0.5): 13.8629,
}


@st.composite
def stable_queues(draw: st.DrawFn) -> tuple[int, float, int]:
    trials = draw(st.integers(1, 60))
    p = draw(st.floats(0.02, 0.98))
    n = draw(st.integers(math.floor(trials * p) + 1, trials + 3))
    return trials, p, n


def stepped(trials: int, p: float, n: int, level: int, cycles: int) -> float:
    """Probability of exceeding `level`, one cycle and one state at a time (plain definition)."""
    law = stats.binom.pmf(np.arange(trials + 1), trials, p)
    alive = np.zeros(level + 1)
    alive[0] = 1.0
    dead = 0.0
    for _ in range(cycles):
        after = np.zeros_like(alive)
        for v, mass in enumerate(alive):
            for y, probability in enumerate(law):
                w = v + y - n if v + y >= n else v + y
                if w > level:
                    dead += mass * probability
                else:
                    after[w] += mass * probability
        alive = after
    return dead


@pytest.mark.parametrize(("key", "value"), EXPONENTS.items())
def test_exponents_of_the_reference_table(key: tuple[int, int, float], value: float) -> None:
    trials, n, p = key
    assert lundberg_exponent(trials, p, n) == pytest.approx(value, rel=2e-6)


@given(stable_queues())
def test_exponent_is_the_root_and_above_hoeffding(queue: tuple[int, float, int]) -> None:
    trials, p, n = queue
    theta = lundberg_exponent(trials, p, n)
    assert theta >= 8.0 * (n - trials * p) / trials * (1.0 - 1e-12)
    if trials <= n:
        assert theta == math.inf
    else:
        moment = trials * (theta + math.log1p((1 - p) * math.expm1(-theta))) - theta * n
        assert moment == pytest.approx(0.0, abs=1e-12 * (1.0 + theta * trials))


@pytest.mark.parametrize(
    ("queue", "level", "cycles"),
    [
        ((10, 0.3, 4), 12, 300),
        ((10, 0.3, 4), 30, 300),
        ((21, 0.3, 9), 7, 40),
        ((5, 0.2, 9), 6, 100),
        ((3, 0.6, 2), 0, 7),
        ((20, 0.5, 19), 18, 60),
    ],
)
def test_first_passage_equals_stepping_cycle_by_cycle(
    queue: tuple[int, float, int], level: int, cycles: int
) -> None:
    """Same probability to 1e-10 relative, also where it is 1e-10 itself and where the level is below n."""
    expected = stepped(*queue, level, cycles)
    assert first_passage_probability(*queue, level, cycles) == pytest.approx(expected, rel=1e-10)


def squared(trials: int, p: float, n: int, level: int, doublings: int) -> float:
    """The same within 2^k cycles by squaring the matrix alone: it eliminates nothing and takes no limit."""
    law = stats.binom.pmf(np.arange(trials + 1), trials, p)
    power = np.zeros((level + 1, level + 1))
    dead = np.zeros(level + 1)
    for v in range(level + 1):
        after = np.arange(v, v + trials + 1)
        after = np.where(after >= n, after - n, after)
        np.add.at(power[v], after[after <= level], law[after <= level])
        dead[v] = math.fsum(law[after > level])
    for _ in range(doublings):
        dead = np.minimum(dead + power @ dead, 1.0)
        power = power @ power
        power *= ((1.0 - dead) / np.maximum(power.sum(axis=1), 1e-300))[:, None]  # keeps errors from doubling
    return float(dead[0])


@pytest.mark.parametrize(
    ("queue", "level", "doublings"),
    [
        ((10, 0.3, 4), 24, 30),
        ((100, 0.3, 35), 110, 18),  # 1e-6 and less, many steps from empty
        ((256, 0.88, 231), 250, 19),  # turns through all remainders many times before it forgets the first
        ((90, 0.98, 89), 95, 12),  # forgets slower still: the stride is doubled
        ((5, 0.2, 9), 2, 10),  # nobody returns to empty: no law is left but that of the last state
        ((1, 0.25, 1), 0, 10),
    ],
)
def test_first_passage_equals_squaring_the_whole_matrix(
    queue: tuple[int, float, int], level: int, doublings: int
) -> None:
    """Witness for the elimination, the limit and the strides: 1e-10 relative, however small."""
    expected = squared(*queue, level, doublings)
    assert first_passage_probability(*queue, level, 2**doublings) == pytest.approx(
        expected, rel=1e-10, abs=1e-300
    )


@settings(max_examples=60)
@given(stable_queues(), st.integers(0, 80), st.integers(0, 24))
def test_first_passage_equals_squaring_for_any_queue(
    queue: tuple[int, float, int], level: int, doublings: int
) -> None:
    expected = squared(*queue, level, doublings)
    assert first_passage_probability(*queue, level, 2**doublings) == pytest.approx(
        expected, rel=1e-9, abs=1e-250
    )


@pytest.mark.parametrize(("trials", "n", "p"), [(10, 4, 0.3), (50, 18, 0.33), (66, 43, 0.619)])
def test_first_passage_at_1e9_cycles_equals_the_leading_eigenvalue(trials: int, n: int, p: float) -> None:
    """Witness: survival is c·λ^b for large b, with λ, c from the eigenvectors of the killed chain."""
    level = exact_buffer(trials, p, n, 10**9, 0.01)
    law = stats.binom.pmf(np.arange(trials + 1), trials, p)
    matrix = np.zeros((level + 1, level + 1))
    for v in range(level + 1):
        for y, probability in enumerate(law):
            w = v + y - n if v + y >= n else v + y
            if w <= level:
                matrix[v, w] += probability
    values, right = np.linalg.eig(matrix)
    lead = int(np.argmax(values.real))
    _, left = np.linalg.eig(matrix.T)
    h, nu = right[:, lead].real, left[:, int(np.argmax(np.linalg.eigvals(matrix.T).real))].real
    survive = h[0] * nu.sum() / (h @ nu) * values[lead].real ** (10**9)
    # The eigenvalue is known to about 1e-15, the power multiplies that by 1e9.
    assert first_passage_probability(trials, p, n, level, 10**9) == pytest.approx(1.0 - survive, abs=2e-5)


def test_first_passage_composes() -> None:
    """P(within b) never falls with b, never rises with the level, and is 0 with no cycle at all."""
    queue = (21, 0.3, 9)
    grid = np.array(
        [[first_passage_probability(*queue, x, b) for b in (0, 1, 10, 1000, 10**7)] for x in range(5, 30)]
    )
    assert np.all(grid[:, 0] == 0.0)
    rounding = 1e-14 * grid
    assert np.all(np.diff(grid, axis=1) >= -rounding[:, 1:])
    assert np.all(np.diff(grid, axis=0) <= rounding[1:])
    assert np.all(grid <= 1.0)


@settings(max_examples=60)
@given(stable_queues(), st.integers(1, 10**9), st.floats(1e-6, 0.5))
def test_exact_buffer_is_the_smallest_and_never_above_lundberg(
    queue: tuple[int, float, int], cycles: int, delta: float
) -> None:
    trials, p, n = queue
    bound = lundberg_buffer(trials, p, n, cycles, delta)
    if bound > 400:  # a queue close to critical
        return
    exact = exact_buffer(trials, p, n, cycles, delta)
    assert exact <= bound
    assert first_passage_probability(trials, p, n, exact, cycles) <= delta
    if exact > 0:
        assert first_passage_probability(trials, p, n, exact - 1, cycles) > delta


def test_bad_boundary_queues_are_named() -> None:
    with pytest.raises(InputError, match=r"exceed trials · probability = 6"):
        lundberg_exponent(10, 0.6, 6)
    with pytest.raises(InputError, match="probability must be below 1"):
        exact_buffer(3, 1.0, 4, 10, 0.1)
    with pytest.raises(InputError, match="overflow_probability"):
        exact_buffer(10, 0.3, 4, 10, 0.0)
    with pytest.raises(InputError, match="cycles"):
        lundberg_buffer(10, 0.3, 4, 0, 0.1)
    with pytest.raises(InputError, match="level"):
        first_passage_probability(10, 0.3, 4, -1, 10)
