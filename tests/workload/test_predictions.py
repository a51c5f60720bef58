"""Predicted output lengths: their laws, their ends, and how paths and workloads carry them.

Statistical tests fix a seed; with a random one each would reject a correct sampler with probability 1e-6.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import fluidsched as fs
from fluidsched import predictions
from fluidsched.errors import InputError

ERROR_RATE = 1e-6

kinds = st.one_of(
    st.builds(predictions.exact),
    st.builds(predictions.lognormal, st.floats(0, 3), st.floats(0.1, 4)),
    st.builds(predictions.interval, st.floats(1, 50)),
    st.builds(
        lambda ends, accuracy: predictions.bucketed([*sorted(ends), 5000], accuracy),
        st.sets(st.integers(1, 4999), min_size=1, max_size=5),
        st.floats(0, 1),
    ),
)
outputs = st.lists(st.integers(1, 5000), min_size=1, max_size=20)
seeds = st.integers(0, 2**32)


def path_of(outputs: list[int]) -> fs.ArrivalPath:
    count = len(outputs)
    return fs.ArrivalPath.from_arrays(np.arange(count), np.full(count, 9), outputs)


@given(kinds, outputs, seeds)
def test_predictions_are_whole_ordered_and_reproducible(
    kind: predictions.Prediction, lengths: list[int], seed: int
) -> None:
    """1 ≤ minimum ≤ predicted; the same seed the same bytes; fewer requests, the same first predictions."""
    path = path_of(lengths).with_predictions(kind, seed)
    predicted, minimum = path.predicted_output_tokens, path.predicted_output_minimum
    assert predicted is not None
    assert predicted.min() >= 1
    if minimum is not None:
        assert np.all((minimum >= 1) & (minimum <= predicted))
    assert path_of(lengths).with_predictions(kind, seed) == path
    first = path_of(lengths[:-1]).with_predictions(kind, seed)
    np.testing.assert_array_equal(first.predicted_output_tokens, predicted[:-1])


@given(kinds)
def test_json_round_trip(kind: predictions.Prediction) -> None:
    """Plain data and back, alone and in a workload."""
    assert predictions.from_dict("predictions", kind.to_dict()) == kind
    assert pickle.loads(pickle.dumps(kind)) == kind
    workload = fs.Workload([fs.RequestType("a", 1.0, 5, 5)]).with_predictions(kind)
    assert fs.Workload.from_dict(workload.to_dict()) == workload
    assert workload != workload.with_predictions(None)


@given(outputs, seeds, st.floats(1, 100))
def test_intervals_hold_the_true_length(lengths: list[int], seed: int, ratio: float) -> None:
    """ℓ ≤ o ≤ u, and u/ℓ is the ratio up to rounding outwards; a ratio of 1 is the truth."""
    path = path_of(lengths).with_predictions(predictions.interval(ratio), seed)
    upper, lower = path.predicted_output_tokens, path.predicted_output_minimum
    assert np.all((lower <= path.output_tokens) & (path.output_tokens <= upper))
    assert np.all(upper - 1 <= ratio * (lower + 1) * (1 + 1e-12))
    exact = path_of(lengths).with_predictions(predictions.interval(1.0), seed)
    np.testing.assert_array_equal(exact.predicted_output_tokens, path.output_tokens)
    np.testing.assert_array_equal(exact.predicted_output_minimum, path.output_tokens)


@given(outputs, seeds)
def test_an_accurate_classifier_names_the_bucket(lengths: list[int], seed: int) -> None:
    """Without errors the bucket holds the true length, and buckets partition the lengths."""
    path = path_of(lengths).with_predictions(predictions.bucketed([7, 100, 5000]), seed)
    upper, lower = path.predicted_output_tokens, path.predicted_output_minimum
    assert np.all((lower <= path.output_tokens) & (path.output_tokens <= upper))
    assert set(zip(lower.tolist(), upper.tolist(), strict=True)) <= {(1, 7), (8, 100), (101, 5000)}


@given(outputs, seeds, st.floats(0.1, 2))
def test_errors_scale_with_one_seed(lengths: list[int], seed: int, cv: float) -> None:
    """No error at cv = 0; at one seed a request overestimated at one cv stays so relative to the median."""
    none = path_of(lengths).with_predictions(predictions.lognormal(0.0), seed)
    np.testing.assert_array_equal(none.predicted_output_tokens, none.output_tokens)
    wide, narrow = (
        path_of(lengths).with_predictions(predictions.lognormal(c, bias=1e3), seed).predicted_output_tokens
        for c in (cv, cv / 2)
    )
    medians = [1e3 * np.array(lengths) / np.sqrt(1 + c * c) for c in (cv, cv / 2)]
    above = [w > m + 1 for w, m in zip((wide, narrow), medians, strict=True)]
    clear = (np.abs(wide - medians[0]) > 2) & (np.abs(narrow - medians[1]) > 2)
    np.testing.assert_array_equal(above[0][clear], above[1][clear])


def test_lognormal_errors_have_their_law() -> None:
    """ln(predicted/o) is normal with mean ln(bias) − σ²/2: Kolmogorov–Smirnov, 5 000 requests of 10⁶ tokens."""
    path = path_of([10**6] * 5000).with_predictions(predictions.lognormal(cv=0.8, bias=0.5), seed=2)
    sigma = np.sqrt(np.log1p(0.64))
    error = np.log(path.predicted_output_tokens / 1e6)
    law = stats.norm(np.log(0.5) - sigma**2 / 2, sigma)
    assert stats.kstest(error, law.cdf).pvalue > ERROR_RATE


def test_interval_places_are_log_uniform() -> None:
    """ln(o/ℓ)/ln(ratio) is uniform: Kolmogorov–Smirnov, 5 000 requests of 10⁶ tokens."""
    path = path_of([10**6] * 5000).with_predictions(predictions.interval(9.0), seed=3)
    place = np.log(1e6 / path.predicted_output_minimum) / np.log(9.0)
    assert stats.kstest(place, "uniform").pvalue > ERROR_RATE


def test_classifier_errors_go_to_either_neighbour() -> None:
    """Accuracy 0.6: middle buckets 0.2 / 0.6 / 0.2, the ends 0.6 / 0.4; Pearson's test per bucket."""
    kind = predictions.bucketed([10, 100, 1000], accuracy=0.6)
    shares = {5: [0.6, 0.4, 0.0], 50: [0.2, 0.6, 0.2], 500: [0.0, 0.4, 0.6]}
    for length, expected in shares.items():
        path = path_of([length] * 4000).with_predictions(kind, seed=4)
        counts = np.array([(path.predicted_output_tokens == end).sum() for end in (10, 100, 1000)])
        possible = np.array(expected) > 0
        assert counts[~possible].sum() == 0
        law = 4000 * np.array(expected)[possible]
        assert stats.chisquare(counts[possible], law).pvalue > ERROR_RATE / 3


@given(kinds, seeds)
def test_sampled_paths_carry_their_workloads_predictions(kind: predictions.Prediction, seed: int) -> None:
    """Predictions change nothing else of a path, and a type's own do not depend on other types."""
    a = fs.RequestType("a", 2.0, 10, fs.lengths.uniform(1, 90))
    b = fs.RequestType("b", 1.0, 10, fs.lengths.uniform(1, 900))
    workload = fs.Workload([b, a]).with_predictions(kind)
    path, plain = workload.sample(20.0, seed), fs.Workload([b, a]).sample(20.0, seed)
    assert path.predicted_output_tokens is not None
    for column in ("arrival_s", "prompt_tokens", "output_tokens", "type"):
        np.testing.assert_array_equal(getattr(path, column), getattr(plain, column))
    alone = fs.Workload([a]).with_predictions(kind).sample(20.0, seed)
    np.testing.assert_array_equal(alone.predicted_output_tokens, path.predicted_output_tokens[path.type == 1])
    assert workload.scaled(2.0).predictions == workload.merged(1).predictions == kind


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: predictions.lognormal(-1), "cv must"),
        (lambda: predictions.lognormal(1, bias=0), "bias must"),
        (lambda: predictions.interval(0.5), "ratio must"),
        (lambda: predictions.bucketed([]), "upper_ends must be a list"),
        (lambda: predictions.bucketed(5), "upper_ends must be a list"),
        (lambda: predictions.bucketed([5, 5]), r"upper_ends\[1\] must be a whole number of at least 6"),
        (lambda: predictions.bucketed([5], accuracy=0.5), "accuracy must be 1"),
        (lambda: predictions.bucketed([5, 9], accuracy=1.5), "accuracy must"),
        (
            lambda: path_of([3, 12]).with_predictions(predictions.bucketed([5, 9]), 1),
            "request 1 has 12 output tokens. Add a larger last end",
        ),
        (lambda: predictions.from_dict("x", {"prediction": "log"}), "x.prediction must be one of"),
        (lambda: predictions.from_dict("x", {"prediction": "interval", "ratio": 0}), "x.ratio must"),
        (lambda: fs.Workload([fs.RequestType("a", 1.0, 5, 5)], predictions=3), "predictions must be a"),
    ],
)
def test_wrong_arguments_are_refused(make, message: str) -> None:
    """Each error names the argument and what it must be."""
    with pytest.raises(InputError, match=message):
        make()
