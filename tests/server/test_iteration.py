"""Iteration times: constructors, convexity, validation, files."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluidsched.errors import InputError
from fluidsched.server import BatchSummary, IterationTime


def test_paper_charges_every_kv_token() -> None:
    """The paper's form: prefills hold p tokens, decodes what they read; nothing else counts."""
    paper = IterationTime.paper(d0=0.01, d1=3e-7)
    assert paper(512, 40, 9_000) == pytest.approx(0.01 + 3e-7 * (512 + 9_000), rel=1e-15)


def test_affine_uses_all_five_coefficients() -> None:
    """T = c0 + c_pf n_pf + c_dec n_dec + c_kv k_dec + c_attn q_pf."""
    affine = IterationTime.affine(1.0, 2.0, 3.0, 5.0, 7.0)
    assert affine(10, 100, 1_000, 10_000) == 1 + 20 + 300 + 5_000 + 70_000


def test_two_piece_bends_at_the_knee() -> None:
    """The knee counts prefilled and decoded tokens together; at the knee both pieces agree."""
    two = IterationTime.two_piece(0.5, 2.0, 10, 3.0, 0.25, 0.125)
    n_pf = np.array([0, 4, 4, 4])
    n_dec = np.array([0, 2, 6, 20])
    n = n_pf + n_dec
    expected = 0.5 + 2.0 * n + 3.0 * np.maximum(0, n - 10) + 0.25 * 8 + 0.125 * 16
    np.testing.assert_array_equal(two(n_pf, n_dec, 8, 16), expected)


def test_second_piece_may_have_a_negative_base() -> None:
    """Only the empty batch must take time; a steep second piece starts below zero."""
    two = IterationTime.two_piece(0.01, 1e-5, 1_000, 1e-4, 0.0)
    assert two.coefficients is not None
    assert two.coefficients[1, 0] < 0
    assert two.empty == 0.01


def test_a_piece_that_never_dominates_is_harmless() -> None:
    """A piece below another one everywhere changes no value."""
    high = IterationTime.affine(0.02, 1e-4, 1e-4, 1e-6)
    both = IterationTime.pieces([high, (0.01, 1e-5, 1e-5, 1e-7, 0.0)])
    # the products are summed by BLAS, whose last digit depends on the shape and the processor
    assert both(300, 20, 4_000) == pytest.approx(high(300, 20, 4_000), rel=1e-15)


def test_arguments_broadcast() -> None:
    """Shapes combine by NumPy's rules; scalars give a scalar array."""
    affine = IterationTime.affine(0.01, 1e-5, 1e-5, 1e-7)
    assert affine(np.arange(3)[:, None], np.arange(4), 5).shape == (3, 4)
    assert affine(1, 1, 1).shape == ()


def test_coefficients_are_read_only() -> None:
    """A frozen object's arrays cannot be changed behind its back."""
    paper = IterationTime.paper(0.01, 3e-7)
    assert paper.coefficients is not None
    with pytest.raises(ValueError, match="read-only"):
        paper.coefficients[0, 0] = 1.0


def test_function_is_constructor_and_attribute() -> None:
    """`IterationTime.function(f)` makes one; on the instance `.function` is f, on pieces None."""

    def square(batch: BatchSummary) -> float:
        return 0.01 + 1e-9 * sum(c**2 for c in batch.prefill_chunks)

    made = IterationTime.function(square)
    assert made.function is square
    assert made.coefficients is None
    assert made.empty == 0.01
    assert IterationTime.paper(0.01, 0.0).function is None
    assert made == IterationTime.function(square)
    assert hash(made) == hash(IterationTime.function(square))
    assert made != IterationTime.paper(0.01, 0.0)
    assert made != IterationTime.function(lambda batch: 0.01)  # neither has coefficients that could differ
    with pytest.raises(InputError, match="piecewise affine for evaluating"):
        made(1, 1, 1)
    with pytest.raises(InputError, match="piecewise affine for writing"):
        made.to_dict()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0.0, 1e-5, 1e-5, 1e-7), "base"),
        ((-0.01, 1e-5, 1e-5, 1e-7), "base"),
        ((0.01, -1e-5, 1e-5, 1e-7), "per_prefill_token"),
        ((0.01, 1e-5, -1e-9, 1e-7), "per_decode_token"),
        ((0.01, 1e-5, 1e-5, math.nan), "per_kv_token"),
        ((0.01, 1e-5, 1e-5, 1e-7, math.inf), "per_prefill_attention"),
        ((math.nan, 1e-5, 1e-5, 1e-7), "base"),
        (("0.01", 1e-5, 1e-5, 1e-7), "base"),
        ((True, 1e-5, 1e-5, 1e-7), "base"),
    ],
)
def test_bad_coefficients_are_named(arguments: tuple[Any, ...], named: str) -> None:
    """NaN, infinity, negative token coefficients and an empty batch without duration are refused by name."""
    with pytest.raises(InputError) as caught:
        IterationTime.affine(*arguments)
    assert caught.value.argument == named


def test_bad_pieces_and_functions_are_refused() -> None:
    """Wrong shapes, functions among pieces, things that are not functions or take no time."""
    with pytest.raises(InputError, match="at least one piece"):
        IterationTime.pieces([])
    with pytest.raises(InputError, match="five numbers"):
        IterationTime.pieces([(0.01, 1e-5), (0.01, 1e-5, 0, 0, 0)])
    with pytest.raises(InputError, match=r"pieces\[1\]"):
        IterationTime.pieces([(0.01, 0, 0, 0, 0), IterationTime.function(lambda batch: 1.0)])
    with pytest.raises(InputError, match="per_kv_token of piece 1"):
        IterationTime.pieces([(0.01, 0, 0, 0, 0), (0.01, 0, 0, -1.0, 0)])
    with pytest.raises(InputError, match="callable"):
        IterationTime.function(0.01)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="empty batch"):
        IterationTime.function(lambda batch: 0.0)
    with pytest.raises(InputError, match="knee_tokens"):
        IterationTime.two_piece(0.01, 1e-5, -1, 1e-5, 0.0)


positive = st.just(0.0) | st.floats(1e-12, 1e-2)
rows = st.tuples(st.floats(1e-9, 1.0) | st.floats(-1.0, -1e-9), positive, positive, positive, positive)


@given(st.lists(rows, min_size=1, max_size=4), st.lists(st.integers(0, 4000), min_size=8, max_size=8))
def test_monotone_convex_and_the_same_after_a_file(pieces: list[Any], counts: list[int]) -> None:
    """More work never takes less time, T is convex in the counts, and JSON brings back the same numbers."""
    pieces = [(0.01, 0.0, 0.0, 0.0, 0.0), *pieces]
    iteration_time = IterationTime.pieces(pieces)
    x, y = np.array(counts[:4], float), np.array(counts[4:], float)
    assert iteration_time(*(x + y)) >= iteration_time(*x) >= iteration_time.empty > 0
    middle = iteration_time(*((x + y) / 2))
    assert middle <= (iteration_time(*x) + iteration_time(*y)) / 2 * (1 + 1e-12)
    again = IterationTime.from_dict(json.loads(json.dumps(iteration_time.to_dict())))
    assert again == iteration_time
    assert hash(again) == hash(iteration_time)


def test_reading_is_strict() -> None:
    """Unknown versions, missing, unknown, non-finite fields and wrong types are named."""
    good = IterationTime.paper(0.01, 3e-7).to_dict()
    assert "base" in good["pieces"][0]
    for change, named in [
        ({"schema": "fluidsched.iteration-time/2"}, "schema"),
        ({"pieces": []}, "pieces"),
        ({"pieces": [{**good["pieces"][0], "base": None}]}, r"pieces\[0\].base"),
        ({"pieces": [{"base": 0.01}]}, r"pieces\[0\].per_prefill_token"),
        ({"pieces": [3]}, r"pieces\[0\]"),
        ({"extra": 1}, "extra"),
    ]:
        with pytest.raises(InputError, match=named):
            IterationTime.from_dict({**good, **change})


def test_repr_names_coefficients_and_units() -> None:
    """A reader sees which number is what, in which unit."""
    shown = repr(IterationTime.two_piece(0.01, 1e-5, 100, 1e-4, 0.0))
    assert "base=0.01" in shown
    assert "[s, s/token, s/token²]" in shown
    assert "IterationTime.function(" in repr(IterationTime.function(lambda batch: 1.0))
