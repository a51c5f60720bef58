"""Embedded workloads: what they keep of their traces, and that the script writes them as they are."""

from __future__ import annotations

import json
import runpy
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import fluidsched as fs
from fluidsched.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "azure_conv": "AzureLLMInferenceTrace_conv.csv",
    "azure_code": "AzureLLMInferenceTrace_code.csv",
    "mooncake_synthetic": "mooncake_synthetic_trace.jsonl",
}


def resident_kv(workload: fs.Workload) -> tuple[float, float]:
    """Mean and standard deviation of the KV of a resident request, seen at a random iteration."""
    rate = workload.arrival_rate
    rounds = rate @ workload.iterations
    mean = rate @ workload.kv_work / rounds
    # Σ_{k=1..o} (p + k − 1)² = o p² + p o(o − 1) + (o − 1) o (2o − 1)/6
    m = workload.moment
    squares = m(2, 1) + m(1, 2) - m(1, 1) + (2 * m(0, 3) - 3 * m(0, 2) + m(0, 1)) / 6
    return mean, float(np.sqrt(rate @ squares / rounds - mean**2))


@pytest.mark.parametrize("name", FILES)
def test_embedded_workloads_are_complete(name: str) -> None:
    """12 types on a 3 × 4 grid, at most 40 points each, source and licence named."""
    workload = fs.workloads.get(name)
    assert workload is fs.workloads.get(name.replace("_", "-"))
    assert workload is getattr(fs.workloads, name)()
    assert workload.name == name
    assert len(workload) == 12
    assert workload.merge_sizes == (1, 3, 6, 12)
    assert all(len(t.law.atoms()[0]) <= 40 for t in workload.types)
    assert "CC-BY-4.0" in workload.source or "Apache-2.0" in workload.source


def test_rates_are_those_of_the_traces() -> None:
    """Requests per second as published with the traces."""
    rates = {name: fs.workloads.get(name).total_arrival_rate for name in fs.workloads.names()}
    assert rates == {
        "azure_code": pytest.approx(2.567, abs=5e-4),
        "azure_conv": pytest.approx(5.530, abs=5e-4),
        "mooncake_synthetic": pytest.approx(3.907, abs=5e-4),
    }


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    """A slip of the pen gets a suggestion."""
    with pytest.raises(InputError, match="Did you mean 'azure_conv'"):
        fs.workloads.get("azure-cnv")


def test_resident_kv_of_the_conversation_mix() -> None:
    """κ̄ = 1226.479 and σ = 712.879 tokens, figures computed from the trace itself, without it."""
    mean, sd = resident_kv(fs.workloads.azure_conv())
    assert mean == pytest.approx(1226.479, abs=5e-4)
    assert sd == pytest.approx(712.879, abs=5e-4)


@pytest.mark.data
@pytest.mark.parametrize("name", FILES)
def test_embedded_laws_keep_what_matters_of_the_trace(data_root: Path, name: str) -> None:
    """Per type: rate, boxes, extremes, moments to degree 3; as a whole: marginal laws to 0.025."""
    traced = fs.read_trace(data_root / "traces" / FILES[name]).to_workload(types=12)
    embedded = fs.workloads.get(name)
    np.testing.assert_array_equal(embedded.arrival_rate, traced.arrival_rate)
    for i, j in product(range(4), repeat=2):
        if i + j <= 3:
            np.testing.assert_allclose(embedded.moment(i, j), traced.moment(i, j), rtol=1e-12)
    for ours, theirs in zip(embedded.types, traced.types, strict=True):
        assert (ours.name, ours.prompt_range, ours.output_range) == (
            theirs.name,
            theirs.prompt_range,
            theirs.output_range,
        )
        for end in ("minimum_prompt", "maximum_prompt", "minimum_output", "maximum_output"):
            assert getattr(ours.law, end) == getattr(theirs.law, end)
    whole = [w.merged(1).types[0].law for w in (embedded, traced)]
    for marginal in ("prompt_law", "output_law"):
        laws = [getattr(law, marginal) for law in whole]
        values = np.union1d(laws[0].values, laws[1].values)
        cdfs = [
            np.concatenate([[0.0], np.cumsum(law.weights)])[np.searchsorted(law.values, values, side="right")]
            for law in laws
        ]
        assert np.abs(cdfs[0] - cdfs[1]).max() < 0.025


@pytest.mark.data
def test_the_script_writes_the_embedded_files(data_root: Path) -> None:
    """Running the script again gives workloads with the same rates, extremes and moments up to degree 3.

    Which 40 points carry a law is decided by a basis that another processor's arithmetic may choose otherwise.
    """
    script = runpy.run_path(str(ROOT / "scripts" / "make_embedded_workloads.py"))
    texts = script["embedded_workloads"](data_root)
    assert set(texts) == set(fs.workloads.names())
    for name, text in texts.items():
        ours, embedded = fs.Workload.from_dict(json.loads(text)), fs.workloads.get(name)
        assert ours.type_names == embedded.type_names
        np.testing.assert_allclose(ours.arrival_rate, embedded.arrival_rate, rtol=1e-12)
        for end in ("minimum_prompt", "maximum_prompt", "minimum_output", "maximum_output"):
            assert [getattr(t.law, end) for t in ours.types] == [getattr(t.law, end) for t in embedded.types]
        for i, j in product(range(4), repeat=2):
            if i + j <= 3:
                np.testing.assert_allclose(ours.moment(i, j), embedded.moment(i, j), rtol=1e-9)
    for name, text in script["rate_profiles"](data_root).items():
        profile = fs.workloads.rate_profile(name)
        assert fs.arrivals.from_dict(name, json.loads(text)) == profile


def test_rate_profiles_keep_the_rate_and_add_the_drift() -> None:
    """With its profile a workload has the same rates; counts per 5-minute step are Poisson about the trace's.

    40 hours of the Azure conversations: Σ (n − m)²/m over 12 steps is χ² (means above 500), at error rate 1e-6.
    """
    for name in fs.workloads.names():
        workload = fs.workloads.get(name, profile=True)
        assert workload.with_arrivals(fs.arrivals.poisson()) == fs.workloads.get(name)
        assert sum(workload.types[0].arrivals.step) > 600
    workload = fs.workloads.azure_conv(profile=True)
    profile = fs.workloads.rate_profile("azure-conv")
    period = sum(profile.step)
    means = np.array(profile.relative_rate) * profile.step
    assert means.sum() / period == pytest.approx(workload.total_arrival_rate)
    path = workload.sample(40 * period, seed=1)
    phase = path.arrival_s % period
    counts = np.histogram(phase, np.concatenate([[0], np.cumsum(profile.step)]))[0]
    statistic = float(((counts - 40 * means) ** 2 / (40 * means)).sum())
    assert 5e-7 < stats.chi2(12).cdf(statistic) < 1 - 5e-7
