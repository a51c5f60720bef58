"""Arrival paths for the tests of this folder."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

import fluidsched as fs


@st.composite
def paths(draw: st.DrawFn) -> fs.ArrivalPath:
    """Any path: with or without types and predictions, with simultaneous arrivals."""
    size = draw(st.integers(1, 12))

    def column(elements: st.SearchStrategy) -> list:
        return draw(st.lists(elements, min_size=size, max_size=size))

    names = draw(st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=3))
    names = [n for n in names if n.isprintable()]
    predicted = column(st.integers(1, 99)) if draw(st.booleans()) else None
    minimum = [max(1, p - 5) for p in predicted] if predicted and draw(st.booleans()) else None
    return fs.ArrivalPath.from_arrays(
        np.sort(column(st.floats(0, 1e6, allow_subnormal=False))),
        column(st.integers(1, 2**31 - 1)),
        column(st.integers(1, 5000)),
        column(st.integers(0, len(names) - 1)) if names else None,
        predicted,
        predicted_output_minimum=minimum,
        type_names=names,
    )
