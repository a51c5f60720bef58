"""Published and measured figures the fluid model must reproduce."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import fluidsched as fs
from fluidsched.fluid.closed_forms import boundary_rate, equilibrium, unlimited_rate

# Paper's model, Llama-2-7B on an A100, 137 000 tokens of KV (Ao et al., arXiv 2504.11320).
CAPACITY = 137_000
LMSYS_D0, LMSYS_D1, LMSYS_KV_WORK = 0.0102484863577943, 3.877682025836559e-7, 29159.356583593526


@pytest.mark.parametrize(
    ("rate", "resident"),
    [
        (10, 3369.37),
        (20, 7723.36),
        (30, 13567.41),
        (40, 21824.35),
        (50, 34377.28),
        (60, 55757.80),
        (70, 100327.32),
        (80, 250508.91),
        (90, math.inf),
        (200, math.inf),
    ],
)
def test_lmsys_mix_resident_kv(rate: float, resident: float) -> None:
    """M* of the lmsys mix, given by its mean KV work; 80 exceeds the capacity, 90 is infinite."""
    kv_demand = rate * LMSYS_KV_WORK
    answer = equilibrium([LMSYS_D0], [LMSYS_D1 * kv_demand], kv_demand, CAPACITY)
    assert float(answer.resident_kv) == pytest.approx(resident, abs=0.005)
    assert bool(answer.is_feasible) == (rate <= 70)


def test_lmsys_mix_boundary() -> None:
    """r_C = 74.1378885771586 with 137 000 tokens, r_∞ = 88.44023127398118 without a limit."""
    busy = [LMSYS_D1 * LMSYS_KV_WORK]
    assert float(boundary_rate([LMSYS_D0], busy, LMSYS_KV_WORK, CAPACITY)) == pytest.approx(
        74.1378885771586, rel=1e-13
    )
    assert float(unlimited_rate([LMSYS_D0], busy)) == pytest.approx(88.44023127398118, rel=1e-13)


@pytest.mark.parametrize(("rate", "resident"), [(12, 1382), (18, 2121), (22, 2634), (24, 2897)])
def test_512_prompt_20_decodes(rate: float, resident: float) -> None:
    """p = 512, o = 21: W = 10 962 and M* as published, from the whole chain."""
    workload = fs.Workload([fs.RequestType("p512 d20", rate, 512, 21)])
    server = fs.Server(CAPACITY, fs.IterationTime.paper(d0=0.010042382503853812, d1=3.342175435455382e-7))
    fluid = fs.solve_fluid(workload, server)
    assert workload.kv_work.tolist() == [10962]
    assert fluid.resident_kv == pytest.approx(resident, abs=0.5)
    assert fluid.is_stable
    assert fluid.critical_rate == pytest.approx(224, abs=0.5)


def test_fitted_models_predict_what_is_observed_where_the_papers_form_cannot() -> None:
    """(512, 20) on Llama-2-7B/A100: the paper's form says 224 req/s; token costs bring it down to a tenth."""
    workload = fs.Workload([fs.RequestType("p512 d20", 1.0, 512, 21)])
    rates = {
        form: fs.solve_fluid(
            workload, fs.catalog.server("a100", "llama-2-7b", source="vidur", iteration_time=form)
        ).critical_rate
        for form in ("paper", "affine", "two-piece")
    }
    assert rates["paper"] > 200
    assert 20 < rates["two-piece"] < 30
    assert 20 < rates["affine"] < 40


@pytest.mark.data
def test_azure_conversation_trace(data_root: Path) -> None:
    """Largest stable rate of the mix: 9.05 by the paper's form, 5.96 affine, 5.60 and 5.83 two-piece."""
    path = fs.read_trace(data_root / "traces" / "AzureLLMInferenceTrace_conv.csv")
    workload = path.to_workload(types=1)
    figures = [("vidur", "paper", 9.05), ("vidur", "affine", 5.96), ("vidur", "two-piece", 5.60)]
    figures.append(("aiconfigurator", "two-piece", 5.83))
    for source, form, rate in figures:
        server = fs.catalog.server("a100-80gb", "llama-2-7b", source=source, iteration_time=form)
        assert fs.solve_fluid(workload, server).critical_rate == pytest.approx(rate, abs=0.005), (
            source,
            form,
        )
    assert workload.total_arrival_rate == pytest.approx(5.53, abs=0.005)


@pytest.mark.data
def test_binning_does_not_move_the_boundary(data_root: Path) -> None:
    """Twelve types carry the trace's moments, so their critical rate is that of the whole."""
    path = fs.read_trace(data_root / "traces" / "AzureLLMInferenceTrace_conv.csv")
    server = fs.catalog.server("a100-80gb", "llama-2-7b")
    one, twelve = (fs.solve_fluid(path.to_workload(types=k), server).critical_rate for k in (1, 12))
    assert twelve == pytest.approx(one, rel=1e-12)


def test_work_conserving_condition_of_li_dai_peng() -> None:
    """A token budget N alone carries λ·E[tokens per request] up to N/T(N) (arXiv 2504.07347)."""
    time = fs.IterationTime.affine(0.01, 5e-5, 5e-5, 0.0)
    workload = fs.Workload([fs.RequestType("a", 3.0, 300, 50), fs.RequestType("b", 1.0, 1000, 10)])
    fluid = fs.solve_fluid(workload, fs.Server(math.inf, time, token_budget=512))
    tokens = float(workload.arrival_rate @ workload.processed_tokens) / workload.total_arrival_rate
    assert fluid.critical_rate * tokens == pytest.approx(512 / float(time(512, 0, 0)), rel=1e-12)


def test_stability_rate_of_nie_si_zhou() -> None:
    """With one piece, r_C = C/(b̄·E[W]), b̄ the iteration time at full memory (arXiv 2605.04595)."""
    time = fs.IterationTime.paper(0.01, 3e-7)
    workload = fs.Workload([fs.RequestType("a", 3.0, 300, 50), fs.RequestType("b", 1.0, 1000, 10)])
    fluid = fs.solve_fluid(workload, fs.Server(100_000, time))
    work = float(workload.arrival_rate @ workload.kv_work) / workload.total_arrival_rate
    assert fluid.critical_rate == pytest.approx(100_000 / ((0.01 + 3e-7 * 100_000) * work), rel=1e-12)


def test_unit_iterations_of_dong_cao() -> None:
    """With T ≡ 1 the condition is Σ λ_j W_j ≤ C (arXiv 2604.11001)."""
    workload = fs.Workload([fs.RequestType("a", 3.0, 30, 5), fs.RequestType("b", 1.0, 100, 10)])
    fluid = fs.solve_fluid(workload, fs.Server(5_000, fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0)))
    assert fluid.load.tolist() == pytest.approx(
        [0.0, float(workload.arrival_rate @ workload.kv_work) / 5_000]
    )


def test_length_selection_beats_the_program_of_one_mixed_type() -> None:
    """A mixed type bounds only policies that do not select by length; split, the bound is higher."""
    both = fs.lengths.joint([10, 10], [1, 2000])
    time = fs.IterationTime.affine(0.1, 0.0, 0.0, 0.0)
    server = fs.Server(math.inf, time, max_batch_size=10)
    mixed = fs.Workload([fs.RequestType("mixed", 20.0, lengths=both)])
    split = fs.Workload([fs.RequestType("short", 10.0, 10, 1), fs.RequestType("long", 10.0, 10, 2000)])
    one, two = (fs.solve_fluid(w, server) for w in (mixed, split))
    assert two.objective_value > one.objective_value
    np.testing.assert_allclose(two.admitted_rate[0], 10.0)
