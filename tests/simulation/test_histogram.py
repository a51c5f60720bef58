"""Logarithmic buckets: the stated error, the two ways to find a bucket, sums of parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from fluidsched.simulation import histogram

durations = st.floats(min_value=2.0**-20, max_value=2.0**24, exclude_max=True)


@given(durations)
def test_a_bucket_stands_for_its_durations_within_the_stated_error(duration):
    place = histogram.bucket(duration)
    assert histogram.buckets([duration])[0] == place
    assert abs(histogram.values()[place] / duration - 1.0) <= histogram.RELATIVE_ERROR * (1 + 1e-12)


def test_beyond_the_ends():
    """Less than a microsecond counts as nothing, half a year and more as 2^24 s; nothing is lost."""
    extremes = np.array([0.0, 5e-324, 2.0**-20 * (1 - 1e-15), 2.0**24, 1e300, math.inf])
    places = histogram.buckets(extremes)
    assert_array_equal(places, [0, 0, 0, *[histogram.BUCKETS - 1] * 3])
    assert_array_equal([histogram.bucket(x) for x in extremes[:-1].tolist()], places[:-1])
    assert histogram.values()[places[0]] == 0.0
    assert histogram.values()[places[-1]] == 2.0**24


@given(st.lists(durations, min_size=1, max_size=60), st.floats(0.0, 1.0))
def test_quantiles_are_within_the_stated_error(sample, level):
    exact = float(np.quantile(sample, level))
    found = histogram.quantile(histogram.count(np.array(sample)), level)
    assert abs(found - exact) <= histogram.RELATIVE_ERROR * exact * (1 + 1e-9)


def test_counts_add():
    rng = np.random.default_rng(3)
    first, second = rng.exponential(size=50), rng.exponential(size=70)
    both = histogram.count(np.concatenate([first, second]))
    assert_array_equal(histogram.count(first) + histogram.count(second), both)
    assert math.isnan(histogram.quantile(histogram.count(np.array([])), 0.5))


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_extreme_quantiles_are_the_extreme_buckets(level):
    counts = histogram.count(np.array([0.01, 0.02, 0.04]))
    expected = histogram.values()[histogram.bucket(0.01 if level == 0.0 else 0.04)]
    assert histogram.quantile(counts, level) == expected
