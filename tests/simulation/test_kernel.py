"""The kernel equals the reference, request by request, for every rule and knob."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from kernel_cases import KINDS, Case, assert_same_run, cases, run_reference_and_judge

from fluidsched.simulation.kernel import run_kernel


def _compare_many(kind: str, dyadic: bool, examples: int) -> None:
    counts = {"run": 0, "discarded": 0}

    @settings(max_examples=examples)
    @given(case=cases(kind, dyadic))
    def compare(case: Case) -> None:
        counts["run"] += 1
        reference, doubtful = run_reference_and_judge(case)
        if doubtful:
            counts["discarded"] += 1
            return
        assert_same_run(case.run(run_kernel), reference)

    compare()
    assert counts["discarded"] <= max(1, 0.01 * counts["run"])


@pytest.mark.parametrize("dyadic", [True, False], ids=["dyadic", "real"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_equals_reference(kind: str, dyadic: bool) -> None:
    """200 random systems per rule: dyadic ones with exact ties, real ones with none."""
    _compare_many(kind, dyadic, 100)


@pytest.mark.slow
@pytest.mark.parametrize("dyadic", [True, False], ids=["dyadic", "real"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_equals_reference_on_many(kind: str, dyadic: bool) -> None:
    """The same on 2 000 random systems per rule."""
    _compare_many(kind, dyadic, 1000)
