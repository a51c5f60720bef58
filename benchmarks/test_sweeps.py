"""What a sweep costs beyond its cells; `sweeps.py` asks the longer questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweeps import empty

from fluidsched.sweeps import sweep


@pytest.mark.parametrize("workers", [None, 2], ids=["here", "two workers"])
def test_thousand_empty_cells(
    benchmark: Any, note: Callable[..., None], tmp_path: Path, workers: int | None
) -> None:
    """Start, a thousand cells without work, the table."""
    places = iter(range(100))

    def run() -> Any:
        return sweep(empty(1000), tmp_path / str(next(places)), workers=workers, format="csv")

    result = benchmark.pedantic(run, rounds=3)
    frame = result.to_frame()
    right = result.failed == 0 and bool((frame.measure_1 == 1 + frame.x / 3.0).all())
    note(cells=1000, right=right)
    assert right
