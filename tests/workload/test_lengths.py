"""Length laws against closed forms, against each other, and their samples against the laws.

Statistical tests fix a seed; with a random one each would reject a correct sampler with probability 1e-6
(`ERROR_RATE`).
"""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from fluidsched import lengths
from fluidsched.errors import InputError

ERROR_RATE = 1e-6

LAWS = {
    "fixed": lengths.fixed(7),
    "uniform": lengths.uniform(3, 11),
    "empirical": lengths.empirical([9, 2, 9, 400], [1, 2, 3, 0.5]),
    "geometric": lengths.geometric(mean=30),
    "geometric cut": lengths.geometric(mean=30, maximum=70, minimum=5),
    "lognormal": lengths.lognormal(mean=80, cv=0.7),
    "lognormal cut": lengths.lognormal(mean=80, cv=2, maximum=200),
    "truncated": lengths.truncated(lengths.geometric(mean=30), 10, 90),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_law_is_a_probability_on_ascending_whole_lengths(name: str) -> None:
    """Values ascend from at least 1, weights are positive with sum 1, moments are their sums."""
    law = LAWS[name]
    assert law.values.dtype == np.int64
    assert law.values[0] >= 1
    assert np.all(np.diff(law.values) > 0)
    assert np.all(law.weights > 0)
    assert math.fsum(law.weights) == pytest.approx(1, abs=1e-15)
    assert (law.minimum, law.maximum) == (law.values.min(), law.values.max())
    for k in range(4):
        brute = math.fsum(w * int(v) ** k for v, w in zip(law.values, law.weights, strict=True))
        assert law.moment(k) == pytest.approx(brute, rel=1e-13)
    assert law.mean == law.moment(1)


@pytest.mark.parametrize("name", LAWS)
def test_laws_survive_plain_data_and_pickling(name: str) -> None:
    """A law read back from its recipe, or unpickled in another process, is equal to the last bit."""
    law = LAWS[name]
    assert lengths.from_dict("law", law.to_dict()) == law
    assert pickle.loads(pickle.dumps(law)) == law


@pytest.mark.parametrize("name", LAWS)
def test_samples_follow_the_law(name: str) -> None:
    """Pearson's test over about 20 cells of equal mass; p-value below `ERROR_RATE` fails."""
    law, size = LAWS[name], 50_000
    drawn = law.sample(np.random.default_rng(11), size)
    assert np.isin(drawn, law.values).all()
    cumulative = np.cumsum(law.weights)
    cuts = np.unique(np.searchsorted(cumulative, np.arange(1, 20) / 20))
    cell = np.searchsorted(cuts, np.arange(len(law.values)), side="left")
    mass = np.bincount(cell, law.weights)
    if len(mass) == 1:
        return
    counts = np.bincount(cell[np.searchsorted(law.values, drawn)], minlength=len(mass))
    assert stats.chisquare(counts, size * mass / mass.sum()).pvalue > ERROR_RATE


def test_uniform_moments() -> None:
    """E[n] = (a + b)/2, Var[n] = ((b − a + 1)² − 1)/12."""
    law = lengths.uniform(5, 104)
    assert law.mean == pytest.approx(54.5, rel=1e-14)
    assert law.moment(2) - law.mean**2 == pytest.approx((100**2 - 1) / 12, rel=1e-12)


@pytest.mark.parametrize(("mean", "minimum"), [(1.5, 1), (200.0, 1), (30.0, 8)])
def test_geometric_moments(mean: float, minimum: int) -> None:
    """With s = 1/(mean − minimum + 1): E = minimum + (1−s)/s, Var = (1−s)/s²; the cut costs below 1e-9."""
    law = lengths.geometric(mean, minimum=minimum)
    s = 1 / (mean - minimum + 1)
    assert not law.is_bounded
    assert law.minimum == minimum
    assert law.mean == pytest.approx(mean, rel=1e-9)
    assert law.moment(2) - law.mean**2 == pytest.approx((1 - s) / s**2, rel=1e-8)
    assert (1 - s) ** len(law.values) <= 1e-12 * (1 + 1e-9)


def test_a_geometric_law_from_zero_tokens_on_is_refused() -> None:
    with pytest.raises(InputError, match="minimum"):
        lengths.geometric(30, minimum=0)


@pytest.mark.parametrize("mean", [2.0, 200.0, 1000.0, 1024.0])
def test_geometric_with_a_maximum_keeps_its_mean_and_its_constant_ratio(mean: float) -> None:
    """The cut law is still geometric (P(n + 1)/P(n) = q) and has the mean asked for."""
    law = lengths.geometric(mean, maximum=2048)
    assert law.is_bounded
    assert law.maximum <= 2048
    assert law.mean == pytest.approx(mean, rel=1e-11)
    large = law.weights > 1e-250
    ratio = law.weights[large][1:] / law.weights[large][:-1]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-10)


@given(st.integers(2, 60))
def test_geometric_is_memoryless(progress: int) -> None:
    """Given n ≥ k, n is geometric from k on with the same q (conditioning once, from scratch)."""
    law = lengths.geometric(mean=20, maximum=400)
    rest = lengths.truncated(law, lo=progress)
    again = lengths.geometric(rest.mean, maximum=400, minimum=progress)
    np.testing.assert_allclose(again.weights, rest.weights, rtol=1e-8)


@pytest.mark.parametrize("cv", [0.05, 0.5, 1.0])
def test_lognormal_moments(cv: float) -> None:
    """E[X²] = m²(1 + cv²) and E[X³] = m³(1 + cv²)³, plus 1/12 and m/4 of rounding to integers (Sheppard)."""
    law = lengths.lognormal(500, cv)
    assert not law.is_bounded
    assert law.mean == pytest.approx(500, rel=1e-11)
    assert law.moment(2) == pytest.approx(500**2 * (1 + cv**2) + 1 / 12, rel=1e-6)
    assert law.moment(3) == pytest.approx(500**3 * (1 + cv**2) ** 3 + 500 / 4, rel=2e-4)


def test_lognormal_weights_against_scipy() -> None:
    """P(n) = F(n + ½) − F(n − ½) of scipy's lognormal given n ≤ maximum, at the μ that gives the mean."""
    law = lengths.lognormal(300, 1.0, maximum=2000)
    values = np.arange(1, 2001)

    def cells(mu: float) -> np.ndarray:
        cdf = stats.lognorm(math.sqrt(math.log(2)), scale=math.exp(mu)).cdf(values + 0.5)
        mass = np.diff(cdf, prepend=0.0)
        return mass / mass.sum()

    mu = optimize.brentq(lambda mu: cells(mu) @ values - 300, 4, 8, xtol=1e-14)
    np.testing.assert_allclose(law.weights, cells(mu), rtol=1e-7, atol=1e-15)


def test_truncation_conditions_and_bounds() -> None:
    """An upper limit makes a law bounded, a lower one alone does not."""
    law = lengths.geometric(mean=30)
    assert lengths.truncated(law, hi=50).is_bounded
    assert not lengths.truncated(law, lo=50).is_bounded
    assert lengths.truncated(lengths.uniform(1, 10), 4, 6) == lengths.uniform(4, 6)


@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 6), st.floats(0.01, 5)),
        min_size=1,
        max_size=15,
    )
)
def test_joint_law_agrees_with_its_parts(points: list[tuple[int, int, float]]) -> None:
    """Moments, marginals and the output profile of a joint law are sums over its points."""
    prompts, outputs, weights = (np.array(c) for c in zip(*points, strict=True))
    law = lengths.joint(prompts, outputs, weights)
    share = weights / weights.sum()
    for i in range(3):
        for j in range(3):
            assert law.moment(i, j) == pytest.approx(
                float((share * prompts**i * outputs**j).sum()), rel=1e-12
            )
    assert law.prompt_law.mean == pytest.approx(law.moment(1, 0), rel=1e-12)
    assert law.output_law.moment(2) == pytest.approx(law.moment(0, 2), rel=1e-12)
    o, weight, mean, mean_square = law.output_profile()
    assert np.all(np.diff(o) > 0)
    assert weight @ (mean * o) == pytest.approx(law.moment(1, 1), rel=1e-12)
    assert weight @ mean_square == pytest.approx(law.moment(2, 0), rel=1e-12)
    np.testing.assert_allclose(weight, law.output_law.weights, rtol=1e-12)
    assert (law.minimum_prompt, law.maximum_output) == (prompts.min(), outputs.max())
    again = lengths.joint(**law.to_dict())
    assert again.weights.tobytes() == law.weights.tobytes()


def test_product_law_equals_its_expansion() -> None:
    """Independent lengths have the moments and profile of all pairs written out."""
    product = lengths.IndependentLengths(lengths.uniform(1, 9), lengths.geometric(mean=4, maximum=30))
    expanded = lengths.joint(*product.atoms())
    for i in range(3):
        for j in range(3):
            assert product.moment(i, j) == pytest.approx(expanded.moment(i, j), rel=1e-12)
    for ours, theirs in zip(product.output_profile(), expanded.output_profile(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_joint_samples_keep_the_dependence() -> None:
    """Frequencies of the points of a dependent law: Pearson's test at `ERROR_RATE`."""
    law = lengths.joint([1, 1, 50, 50], [1, 9, 1, 9], [4, 1, 1, 4])
    p, o = law.sample(np.random.default_rng(3), 40_000)
    counts = [int(((p == a) & (o == b)).sum()) for a, b in zip(*law.atoms()[:2], strict=True)]
    assert stats.chisquare(counts, 40_000 * law.weights).pvalue > ERROR_RATE


def test_first_draws_do_not_depend_on_the_size() -> None:
    """A longer sample begins with the shorter one, for joint and product laws."""
    for law in (
        lengths.joint([1, 2], [3, 4]),
        lengths.IndependentLengths(lengths.uniform(1, 99), lengths.uniform(1, 99)),
    ):
        short, long = (np.array(law.sample(np.random.default_rng(5), n)) for n in (10, 40))
        np.testing.assert_array_equal(long[:, :10], short)


def test_expansion_of_a_large_product_is_refused() -> None:
    """A product of more than 2^20 points is not written out."""
    big = lengths.IndependentLengths(lengths.uniform(1, 2000), lengths.uniform(1, 2000))
    with pytest.raises(InputError, match="possible lengths"):
        big.atoms()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lengths.fixed(0), "tokens must be a whole number of at least 1"),
        (lambda: lengths.fixed(2.5), "tokens must be a whole number"),
        (lambda: lengths.uniform(5, 4), "hi must"),
        (lambda: lengths.empirical([]), "hold at least one length"),
        (lambda: lengths.empirical([3, 0]), r"values\[1\]"),
        (lambda: lengths.empirical([3.5]), r"values\[0\]"),
        (lambda: lengths.empirical([math.nan]), r"values\[0\]"),
        (lambda: lengths.empirical(["a"]), "whole numbers of tokens"),
        (lambda: lengths.empirical([[1, 2]]), "one-dimensional"),
        (lambda: lengths.empirical([1, 2], [1]), "one per length"),
        (lambda: lengths.empirical([1, 2], [1, -1]), r"weights\[1\]"),
        (lambda: lengths.empirical([1, 2], [0, 0]), "positive, finite sum"),
        (lambda: lengths.geometric(1), "mean must"),
        (lambda: lengths.geometric(math.nan), "mean must"),
        (lambda: lengths.geometric(60, maximum=100), "Raise `maximum`"),
        (lambda: lengths.geometric(1e6), "Give `maximum`"),
        (lambda: lengths.lognormal(100, 0), "cv must"),
        (lambda: lengths.lognormal(100, 1, maximum=150), "Raise `maximum`"),
        (lambda: lengths.lognormal(1e6, 2), "Give `maximum`"),
        (lambda: lengths.truncated(lengths.uniform(1, 5), 7, 9), "meet the law's range 1..5"),
        (lambda: lengths.truncated(5), "be a length law"),
        (lambda: lengths.joint([1, 2], [1]), "one per prompt"),
        (lambda: lengths.from_dict("x", {"law": "geometri", "mean": 3}), "Did you mean 'geometric'"),
        (lambda: lengths.from_dict("x", {"law": "geometric"}), "x.mean"),
        (lambda: lengths.from_dict("x", {"law": "geometric", "mean": 3, "max": 9}), "x.max must be left out"),
        (lambda: lengths.from_dict("x", {"law": "geometric", "mean": -3}), "x.mean must"),
        (lambda: lengths.from_dict("x", {"law": "truncated", "of": 5, "lo": 7}), "x.lo, hi must"),
    ],
)
def test_wrong_laws_are_refused_with_the_argument_named(make, message: str) -> None:
    """Each error names the argument at fault."""
    with pytest.raises(InputError, match=message):
        make()


def test_laws_print_their_recipe() -> None:
    """Reading a law's repr tells how to make it."""
    assert repr(lengths.geometric(mean=200, maximum=2048)) == "geometric(mean=200, maximum=2048, minimum=1)"
    assert repr(lengths.truncated(lengths.uniform(1, 9), hi=5)) == "truncated(of=uniform(lo=1, hi=9), hi=5)"
    assert repr(lengths.empirical([5, 40])) == "empirical(2 values in 5..40)"


@given(st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=300), st.integers(0, 2**32))
def test_guided_inversion_is_binary_search(weights: list[float], seed: int) -> None:
    """Many draws at once, which go through the guide, are those of one by one: cell ends and atoms' ends too."""
    law = lengths.empirical(np.arange(1, len(weights) + 1), weights)
    cumulative = np.cumsum(law.weights)
    cumulative /= cumulative[-1]
    rng = np.random.default_rng(seed)
    ends = np.concatenate([cumulative[:-1], np.arange(64) / 64, np.nextafter(cumulative[:-1], 0.0)])
    uniforms = np.concatenate([rng.random(500), ends[ends < 1.0]])
    assert np.array_equal(law.inversion(uniforms), np.searchsorted(cumulative, uniforms, side="right"))
