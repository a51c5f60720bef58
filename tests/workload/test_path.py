"""Arrival paths: what they accept, thinning, labels, CSV."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from path_cases import paths
from scipy import stats

import fluidsched as fs
from fluidsched.errors import InputError

ERROR_RATE = 1e-6


@given(paths())
def test_csv_round_trip(tmp_path_factory: pytest.TempPathFactory, path: fs.ArrivalPath) -> None:
    """`to_csv` then `read_trace` gives the same times to the last bit, the same lengths and labels."""
    file = tmp_path_factory.mktemp("csv") / "path.csv"
    assert path.to_csv(file) == file.read_bytes().decode()
    back = fs.read_trace(file)
    for column in ("arrival_s", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(getattr(back, column), getattr(path, column))
    assert [back.label(i) for i in range(len(path))] == [path.label(i) for i in range(len(path))]
    for column in ("predicted_output_tokens", "predicted_output_minimum"):
        if getattr(path, column) is None:
            assert getattr(back, column) is None
        else:
            np.testing.assert_array_equal(getattr(back, column), getattr(path, column))
    assert (back.horizon, back.name) == (None, "path")


def test_rate_is_requests_over_duration() -> None:
    """A replayed path lasts from its first to its last arrival, a sampled one for its horizon."""
    replayed = fs.ArrivalPath.from_arrays([1.0, 2.0, 5.0], [9, 9, 9], [1, 1, 1])
    assert (replayed.duration, replayed.rate) == (4.0, 0.75)
    sampled = fs.ArrivalPath.from_arrays([1.0, 2.0, 5.0], [9, 9, 9], [1, 1, 1], horizon=6.0)
    assert (sampled.duration, sampled.rate) == (6.0, 0.5)
    at_once = fs.ArrivalPath.from_arrays([0, 0], [9, 9], [1, 1])
    assert at_once.rate == math.inf
    assert "all at once" in repr(at_once)


def test_paths_are_frozen_copies() -> None:
    """Arrays are copied in and cannot be written to."""
    times = np.array([0.0, 1.0])
    path = fs.ArrivalPath.from_arrays(times, [1, 1], [1, 1])
    times[0] = 0.5
    assert path.arrival_s[0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        path.arrival_s[0] = 3.0
    assert pickle.loads(pickle.dumps(path)) == path


def test_fingerprint_sees_every_column() -> None:
    """Any change of the requests changes the fingerprint; the name does not."""
    base = {"arrival_s": [0.0, 1.0], "prompt_tokens": [5, 6], "output_tokens": [7, 8]}
    changes = [
        {},
        {"arrival_s": [0.0, 1.5]},
        {"prompt_tokens": [5, 7]},
        {"output_tokens": [7, 9]},
        {"type": [0, 0], "type_names": ["a"]},
        {"type": [0, 0], "type_names": ["b"]},
        {"predicted_output_tokens": [7, 8]},
        {"predicted_output_tokens": [7, 8], "predicted_output_minimum": [7, 8]},
        {"predicted_output_tokens": [7, 8], "predicted_output_minimum": [6, 8]},
        {"horizon": 3.0},
    ]
    prints = {fs.ArrivalPath.from_arrays(**(base | change)).fingerprint for change in changes}
    assert len(prints) == len(changes)
    assert fs.ArrivalPath.from_arrays(**base, name="other").fingerprint in prints


@given(paths(), st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))
def test_thinning_is_monotone(path: fs.ArrivalPath, seed: int, f: float, g: float) -> None:
    """With one seed a larger fraction keeps a superset; 1 keeps all, 0 none."""
    few, many = (path.thinned(x, seed) for x in sorted((f, g)))
    kept = [list(zip(q.arrival_s, q.prompt_tokens, q.output_tokens, strict=True)) for q in (few, many, path)]
    iterators = iter(kept[1]), iter(kept[2])
    assert all(row in iterators[0] for row in kept[0])
    assert all(row in iterators[1] for row in kept[1])
    assert path.thinned(1.0, seed) == path
    assert len(path.thinned(0.0, seed)) == 0


def test_thinning_by_type_keeps_the_fractions() -> None:
    """The number kept of each type is binomial; horizon and labels stay."""
    types = [fs.RequestType("a", 20.0, 10, 5), fs.RequestType("b", 10.0, 10, 5)]
    path = fs.Workload(types).sample(1000.0, seed=3)
    thin = path.thinned([0.25, 0.9], seed=4)
    for index, fraction in enumerate((0.25, 0.9)):
        before, after = (int((q.type == index).sum()) for q in (path, thin))
        assert stats.binomtest(after, before, fraction).pvalue > ERROR_RATE
    assert (thin.horizon, thin.type_names) == (1000.0, ("a", "b"))


def test_thinning_a_path_without_types_takes_one_fraction() -> None:
    """Per-type fractions need labels, and the error says how to get them."""
    path = fs.ArrivalPath.from_arrays([0, 1, 2, 3], [10, 10, 900, 900], [5, 80, 5, 80])
    with pytest.raises(InputError, match=r"path\.labelled"):
        path.thinned([0.5, 0.5], seed=1)
    labelled = path.labelled(path.to_workload(types=4))
    assert [labelled.label(i) for i in range(4)] == list(labelled.type_names)
    only_first = labelled.thinned([1, 0, 0, 0], seed=1)
    assert only_first.arrival_s.tolist() == [0.0]
    for wrong in ([0.5, 0.5], [0.5, 0.5, 0.5, 1.5], [0.5, 0.5, 0.5, math.nan]):
        with pytest.raises(InputError, match="fraction_per_type"):
            labelled.thinned(wrong, seed=1)


def test_frame_has_one_row_per_request() -> None:
    """The exported table names types and keeps the order."""
    path = fs.ArrivalPath.from_arrays([0, 1], [3, 4], [5, 6], [1, 0], type_names=("x", "y"))
    frame = path.to_frame()
    assert list(frame.columns) == ["arrival_s", "prompt_tokens", "output_tokens", "type"]
    assert frame["type"].tolist() == ["y", "x"]
    assert "<table" in path._repr_html_()


BASE = {"arrival_s": [0.0, 1.0, 1.0], "prompt_tokens": [5, 6, 7], "output_tokens": [1, 2, 3]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrival_s": [0.0, math.nan, 1.0]}, r"arrival_s\[1\] must be finite"),
        ({"arrival_s": [0.0, 2.0, 1.0]}, r"arrival_s\[2\] must not be before .* Sort"),
        ({"arrival_s": [-1.0, 2.0, 3.0]}, r"arrival_s\[0\]"),
        ({"arrival_s": ["a", "b", "c"]}, "arrival_s must be numbers"),
        ({"arrival_s": [[0.0]]}, "one-dimensional"),
        ({"prompt_tokens": [5, 0, 7]}, r"prompt_tokens\[1\]"),
        ({"prompt_tokens": [5, 6]}, "one per request"),
        ({"output_tokens": [1, 2, 2.5]}, r"output_tokens\[2\]"),
        ({"output_tokens": [1, 2, 2**31]}, r"output_tokens\[2\]"),
        ({"predicted_output_tokens": [1, 2, -3]}, r"predicted_output_tokens\[2\]"),
        ({"predicted_output_minimum": [1, 2, 3]}, "predicted_output_tokens must be given with"),
        (
            {"predicted_output_tokens": [1, 2, 3], "predicted_output_minimum": [1, 3, 4]},
            r"predicted_output_minimum\[1\] must be at most predicted_output_tokens, 2",
        ),
        ({"type": [0, 1, 0], "type_names": ["a"]}, r"type\[1\]"),
        ({"type": [0.0, 0.5, 0.0], "type_names": ["a"]}, "type must"),
        ({"type_names": ["a", "a"]}, "unique"),
        ({"type_names": [""]}, "non-empty"),
        ({"horizon": 0.5}, "not before the last arrival"),
        ({"horizon": math.inf}, "horizon must"),
    ],
)
def test_wrong_columns_are_refused_with_the_first_offender(change: dict, message: str) -> None:
    """Each error names the column and the index."""
    with pytest.raises(InputError, match=message):
        fs.ArrivalPath.from_arrays(**(BASE | change))


def test_files_are_not_left_behind_by_a_failed_export(tmp_path: Path) -> None:
    """Writing into a missing folder is an input error."""
    with pytest.raises(InputError, match="existing directory"):
        fs.ArrivalPath.from_arrays(**BASE).to_csv(tmp_path / "missing" / "path.csv")
