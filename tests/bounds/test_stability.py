"""Stability conditions of the literature against the fluid program on servers of their own model."""

from __future__ import annotations

import math

import pytest

import fluidsched as fs
from fluidsched.bounds import stability_conditions
from fluidsched.errors import InputError

MIX = fs.Workload([fs.RequestType("a", 1.0, 30, 20), fs.RequestType("b", 2.0, 100, 7)])


def test_nie_si_zhou_is_the_fluid_boundary_of_the_papers_model() -> None:
    server = fs.Server(20_000, fs.IterationTime.paper(d0=0.01, d1=1e-6))
    nie, li, dong = stability_conditions(MIX, server)
    assert nie.value == pytest.approx(fs.solve_fluid(MIX, server).critical_rate, rel=1e-9)
    assert not li.applies
    assert not dong.applies


def test_reference_boundary_of_the_llama_mix() -> None:
    """r_C = 74.1378885771586 of the mix given by its mean KV work 29159.356583593526."""
    capacity, d0, d1 = 137_000, 0.0102484863577943, 3.877682025836559e-7
    work = 29159.356583593526
    unit = fs.Workload([fs.RequestType("one", 1.0, 1, 1)])  # W = 1, so the rate is the capacity per unit work
    nie, _, _ = stability_conditions(unit, fs.Server(capacity, fs.IterationTime.paper(d0=d0, d1=d1)))
    assert nie.value is not None
    assert nie.value / work == pytest.approx(74.1378885771586, rel=1e-12)


def test_li_dai_peng_is_the_fluid_boundary_without_memory_limit() -> None:
    server = fs.Server(math.inf, fs.IterationTime.affine(0.01, 1e-5, 1e-5, 0.0), token_budget=512)
    nie, li, dong = stability_conditions(MIX, server)
    assert li.value == pytest.approx(fs.solve_fluid(MIX, server).critical_rate, rel=1e-9)
    assert not nie.applies
    assert not dong.applies


def test_dong_cao_is_the_fluid_boundary_at_constant_iteration_time() -> None:
    server = fs.Server(20_000, fs.IterationTime.affine(0.02, 0.0, 0.0, 0.0))
    _, li, dong = stability_conditions(MIX, server)
    assert dong.value == pytest.approx(fs.solve_fluid(MIX, server).critical_rate, rel=1e-9)
    assert not li.applies


@pytest.mark.parametrize(
    ("server", "reasons"),
    [
        (
            fs.Server(1000, fs.IterationTime.paper(0.01, 1e-6), max_batch_size=8),
            ("batch size", "KV capacity is finite", "depends on the batch"),
        ),
        (
            fs.Server(math.inf, fs.IterationTime.affine(0.01, 1e-5, 1e-5, 1e-9), token_budget=100),
            ("not d0 + d1·KV", "not a function of the tokens", "depends on the batch"),
        ),
        (
            fs.Server(math.inf, fs.IterationTime.two_piece(0.01, 1e-5, 200, 1e-4, 0.0), token_budget=512),
            ("one affine piece", "negative base", "depends on the batch"),
        ),
        (
            fs.Server(math.inf, fs.IterationTime.function(lambda batch: 0.1)),
            ("one affine piece", "no token budget", "depends on the batch"),
        ),
    ],
)
def test_outside_its_model_a_condition_says_why(server: fs.Server, reasons: tuple[str, ...]) -> None:
    for bound, reason in zip(stability_conditions(MIX, server), reasons, strict=True):
        assert bound.value is None
        assert reason in bound.condition
        assert "not applicable" in repr(bound)


def test_a_workload_without_rate_has_no_mix() -> None:
    with pytest.raises(InputError, match="have a mix"):
        stability_conditions(MIX.scaled(0.0), fs.Server(10, fs.IterationTime.paper(1.0, 0.0)))
