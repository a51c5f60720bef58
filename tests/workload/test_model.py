"""Workloads: moments by brute force, laws of sampling, round trips, errors."""

from __future__ import annotations

import numpy as np
import pytest

import fluidsched as fs
from fluidsched.errors import InputError


def brute_force(law: fs.lengths.JointLaw, f) -> float:
    """E[f(p, o)] summed point by point, iteration by iteration where f does so."""
    return sum(w * f(int(p), int(o)) for p, o, w in zip(*law.atoms(), strict=True))


LAWS = {
    "fixed": fs.RequestType("fixed", 1.0, 512, 21),
    "independent": fs.RequestType(
        "independent", 2.0, fs.lengths.uniform(1, 9), fs.lengths.empirical([5, 40])
    ),
    "joint": fs.RequestType("joint", 3.0, lengths=fs.lengths.joint([10, 10, 300], [5, 40, 7], [1, 2, 3])),
}


@pytest.mark.parametrize("kind", LAWS)
def test_work_per_request_is_the_sum_over_its_iterations(kind: str) -> None:
    """S, τ, W of theory.md section 1: iteration k = 1..o holds p + k − 1 tokens."""
    law = LAWS[kind].law
    workload = fs.Workload([LAWS[kind]])
    expected = {
        "iterations": brute_force(law, lambda p, o: o),
        "processed_tokens": brute_force(law, lambda p, o: p + o - 1),
        "kv_work": brute_force(law, lambda p, o: sum(p + k - 1 for k in range(1, o + 1))),
        "prefill_attention": brute_force(law, lambda p, o: p * p / 2),
        "mean_prompt_tokens": brute_force(law, lambda p, o: p),
        "mean_output_tokens": brute_force(law, lambda p, o: o),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(workload, name), [value], rtol=1e-13, err_msg=name)


def test_largest_work_uses_the_largest_lengths() -> None:
    """theory.md section 1: three requests of p = 10, o in {5, 40}: 1860 expected; W^max = 1180 each."""
    half = fs.Workload([fs.RequestType("a", 1.0, 10, fs.lengths.empirical([5, 40]))])
    assert 3 * half.kv_work[0] == 1860
    assert half.max_kv_work[0] == 40 * 10 + 40 * 39 / 2


def test_json_round_trip() -> None:
    """What is written is read back equal, fingerprint included."""
    workload = fs.Workload(LAWS.values(), "three", "all kinds of laws", "made up")
    assert fs.Workload.from_dict(workload.to_dict()) == workload


def test_unique_names_are_required() -> None:
    """Two types of one name are refused."""
    with pytest.raises(InputError, match="unique"):
        fs.Workload([LAWS["fixed"], LAWS["fixed"]])
