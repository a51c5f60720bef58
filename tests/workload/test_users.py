"""Sequences of users: what is drawn, which random numbers are shared, what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.workload import UserSequences

TWO = fs.Workload(
    [
        fs.RequestType("a", 3.0, fs.lengths.geometric(90), 7),
        fs.RequestType("b", 1.0, 2, fs.lengths.uniform(5, 9)),
    ]
)


def test_more_only_adds():
    """More users, more turns, a longer horizon: the earlier requests stay."""
    few = UserSequences.draw(TWO, 4, think_mean=2.0, turns=10, seed=5)
    frame = few.to_frame()
    for other in (
        UserSequences.draw(TWO, 9, think_mean=2.0, turns=10, seed=5),
        UserSequences.draw(TWO, 4, think_mean=2.0, turns=25, seed=5),
        UserSequences.draw(TWO, 4, think_mean=2.0, horizon=300.0, seed=5),
    ):
        both = frame.merge(other.to_frame(), on=list(frame.columns))
        assert len(both) == len(frame) == 40
        assert len(other) > 40


def test_think_times_stretch_and_types_keep_their_numbers():
    """Another mean stretches the same think times; a type's lengths do not depend on the other types' laws."""
    ours = UserSequences.draw(TWO, 3, think_mean=2.0, think_cv=0.5, turns=50, seed=2)
    slower = UserSequences.draw(TWO, 3, think_mean=6.0, think_cv=0.5, turns=50, seed=2)
    assert_allclose(slower.think_s, 3.0 * ours.think_s, rtol=1e-12)
    assert_array_equal(slower.output_tokens, ours.output_tokens)
    other = TWO.with_types([dataclasses.replace(TWO.types[0], output_tokens=99), TWO.types[1]])
    changed = UserSequences.draw(other, 3, think_mean=2.0, think_cv=0.5, turns=50, seed=2)
    second = ours.type == 1
    assert_array_equal(changed.output_tokens[second], ours.output_tokens[second])


def test_laws_drawn():
    """Gamma think times of given mean and cv, types in proportion to rates, independent users (each test at 1e-4)."""
    asked = UserSequences.draw(TWO, 200, think_mean=2.0, think_cv=0.5, turns=50, seed=11)
    assert stats.kstest(asked.think_s, stats.gamma(4.0, scale=0.5).cdf).pvalue > 1e-4
    assert stats.binomtest(int((asked.type == 0).sum()), len(asked), 0.75).pvalue > 1e-4
    means = asked.think_s.reshape(200, 50).mean(axis=1)
    assert stats.kstest(means, stats.norm(2.0, 1.0 / np.sqrt(50)).cdf).pvalue > 1e-4
    assert (UserSequences.draw(TWO, 2, think_mean=3.0, think_cv=0.0, turns=4).think_s == 3.0).all()


def test_a_horizon_is_enough_for_any_server():
    """With answers that take no time everybody's next question would come after it."""
    asked = UserSequences.draw(TWO, 50, think_mean=4.0, horizon=30.0, seed=1)
    path, index = asked.open_path()
    assert path.arrival_s.max() <= 30.0
    assert sorted(index.tolist()) == list(range(len(asked)))
    longer = UserSequences.draw(TWO, 50, think_mean=4.0, turns=60, seed=1)
    sums = np.cumsum(longer.think_s.reshape(50, 60), axis=1)
    assert_array_equal(np.bincount(asked.user, minlength=50), (sums <= 30.0).sum(axis=1))


def test_open_paths_keep_what_is_asked():
    """Every question, with its lengths and type, think time and stated response after the one before."""
    asked = UserSequences.draw(TWO, 5, think_mean=1.0, turns=6, seed=3)
    path, index = asked.open_path(response_s=0.25)
    due = (asked.think_s.reshape(5, 6).cumsum(axis=1) + 0.25 * np.arange(6)).ravel()
    assert_allclose(path.arrival_s, due[index], rtol=1e-12)
    assert_array_equal(path.output_tokens, asked.output_tokens[index])
    assert path.label(0) == asked.type_names[asked.type[index[0]]]
    assert len(UserSequences([], [], [], []).open_path()[0]) == 0


def test_they_cannot_be_changed():
    asked = UserSequences.draw(TWO, 2, think_mean=1.0, turns=2)
    for name in ("user", "think_s", "prompt_tokens", "output_tokens", "type"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(asked, name)[0] = 1
    given = np.array([1.0, 2.0])
    kept = UserSequences([0, 0], given, [3, 3], [4, 4])
    given[0] = 9.0
    assert kept.think_s[0] == 1.0


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        (r"user\[2\] must be at least 0 and not below", ([0, 1, 0], [0.0] * 3, [1] * 3, [1] * 3)),
        (r"user\[0\] must be at least 0", ([-1, 1, 1], [0.0] * 3, [1] * 3, [1] * 3)),
        ("user must be whole numbers", ([0.5], [0.0], [1], [1])),
        ("think_s must be 2 times", ([0, 0], [0.0], [1, 1], [1, 1])),
        (r"think_s\[1\] must be finite", ([0, 0], [0.0, -1.0], [1, 1], [1, 1])),
        (r"think_s\[0\] must be finite", ([0], [float("nan")], [1], [1])),
        (r"output_tokens\[0\]", ([0], [0.0], [1], [0])),
        ("prompt_tokens must have one per request", ([0, 0], [0.0, 1.0], [1], [1, 1])),
        (r"type\[0\] must index", ([0], [0.0], [1], [1], [3], ("a",))),
        ("users must be", ([4], [0.0], [1], [1], None, (), 3)),
    ],
)
def test_wrong_columns_are_named(match, arguments):
    with pytest.raises(InputError, match=match):
        UserSequences(*arguments)


@pytest.mark.parametrize(
    ("match", "workload", "options"),
    [
        ("workload must be a Workload", 5, {}),
        ("users must be", TWO, {"users": 0}),
        ("think_mean must be", TWO, {"think_mean": -1.0}),
        ("think_cv must be", TWO, {"think_cv": 1e-9}),
        ("turns and horizon must be one of the two", TWO, {"horizon": 9.0}),
        ("turns and horizon must be one of the two", TWO, {"turns": None}),
        (
            "think_mean must be above 0 s with a horizon",
            TWO,
            {"turns": None, "horizon": 9.0, "think_mean": 0.0},
        ),
        ("users must ask at most", TWO, {"users": 10**6, "turns": 10**4}),
        ("arrival_rate must have a positive sum", TWO.scaled(0.0), {}),
        ("workload.predictions must be None", TWO.with_predictions(fs.predictions.exact()), {}),
        ("cached_prefix_fraction of type 'a' must be 0", TWO.with_cached_prefixes(0.5), {}),
        (
            "patience of type 'a' must be None",
            TWO.with_types([dataclasses.replace(TWO.types[0], patience=fs.patience.fixed(3.0))]),
            {},
        ),
    ],
)
def test_what_cannot_be_drawn_is_named(match, workload, options):
    with pytest.raises(InputError, match=match):
        UserSequences.draw(workload, **{"users": 3, "think_mean": 1.0, "turns": 2, **options})
