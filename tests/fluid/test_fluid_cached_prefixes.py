"""Cached prefixes: what the fluid program makes of them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fluid_cases import iteration_times, logarithmic, servers, workloads
from hypothesis import given, settings
from hypothesis import strategies as st

import fluidsched as fs
from fluidsched.bounds import stability_conditions
from fluidsched.errors import InputError
from fluidsched.fluid import block_kv_work, busy_work, chunk_overhead, solve_pools

fractions = st.one_of(st.sampled_from([0.1, 0.5, 0.75, 0.999]), st.floats(0.0, 1.0, exclude_max=True))
lengths = st.tuples(st.integers(1, 200), st.integers(1, 40))
PAPER = fs.Server(50_000, fs.IterationTime.paper(d0=0.01, d1=3.3e-7), name="paper")


def chat(fraction: float, rate: float = 4.0) -> fs.Workload:
    """One type of prompt 1000, output 101."""
    return fs.Workload([fs.RequestType("chat", rate, 1000, 101, cached_prefix_fraction=fraction)])


def cached_law(prompt: int, fraction: float) -> list[tuple[int, float]]:
    """The cached tokens of one prompt and their probabilities: whole, with mean min(f p, p − 1)."""
    mean = min(fraction * prompt, prompt - 1.0)
    low = math.floor(mean)
    return [(c, w) for c, w in ((low, low + 1 - mean), (low + 1, mean - low)) if w > 0.0]


def lived(
    prompt: int, output: int, cached: int, chunk: int, block: int, piece: Any
) -> tuple[float, float, int, int]:
    """Run one request alone, iteration by iteration: busy time, KV work, iterations, tokens."""
    busy, kv, iterations, tokens, done = 0.0, 0, 0, 0, cached
    while done < prompt:
        size = min(chunk, prompt - done)
        busy += piece[1] * size + piece[4] * sum(done + t + 0.5 for t in range(size))
        done, tokens, iterations = done + size, tokens + size, iterations + 1
        kv += block * math.ceil(done / block)
    for k in range(2, output + 1):
        busy += piece[2] + piece[3] * (prompt + k - 1)
        tokens, iterations = tokens + 1, iterations + 1
        kv += block * math.ceil((prompt + k - 1) / block)
    return busy, kv, iterations, tokens


@settings(max_examples=60, deadline=None)
@given(
    st.lists(lengths, min_size=1, max_size=3),
    fractions,
    iteration_times(),
    st.integers(1, 90),
    st.sampled_from([1, 5, 16]),
    st.booleans(),
)
def test_coefficients_are_the_expectation_of_requests_run_step_by_step(
    points: list[tuple[int, int]],
    fraction: float,
    iteration_time: fs.IterationTime,
    chunk: int,
    block: int,
    independent: bool,
) -> None:
    """Brute force over lengths and cached tokens, prompts in chunks of any size, KV in blocks of any size."""
    prompts, outputs = map(list, zip(*points, strict=True))
    if independent:
        laws: dict[str, Any] = {
            "prompt_tokens": fs.lengths.empirical(prompts),
            "output_tokens": fs.lengths.empirical(outputs),
        }
        points = list(itertools.product(prompts, outputs))
    else:
        laws = {"lengths": fs.lengths.joint(prompts, outputs)}
    workload = fs.Workload([fs.RequestType("mixed", 1.0, **laws, cached_prefix_fraction=fraction)])
    coefficients = iteration_time.coefficients
    assert coefficients is not None
    expected = np.zeros((len(coefficients), 4))
    for i, piece in enumerate(coefficients):
        for prompt, output in points:
            for cached, weight in cached_law(prompt, fraction):
                life = lived(prompt, output, cached, chunk, block, piece)
                expected[i] += weight / len(points) * np.array(life)
    np.testing.assert_allclose(busy_work(workload, iteration_time)[:, 0], expected[:, 0], rtol=1e-9)
    more_iterations, more_kv = chunk_overhead(workload, chunk, block)
    np.testing.assert_allclose(block_kv_work(workload, block) + more_kv, expected[0, 1], rtol=1e-9)
    np.testing.assert_allclose(workload.iterations + more_iterations, expected[0, 2], rtol=1e-9)
    np.testing.assert_allclose(workload.processed_tokens, expected[0, 3], rtol=1e-9)


def test_the_closed_form_by_hand() -> None:
    """p = 1000, o = 101, 0.6 cached: 400 prefilled, W = 106 050, and the boundary C/(c0 W + C w)."""
    workload = chat(0.6)
    assert workload.mean_prefill_tokens.tolist() == [400.0]
    assert workload.processed_tokens.tolist() == [500.0]
    assert workload.prefill_attention.tolist() == [400.0 * (600.0 + 200.0)]
    assert workload.kv_work.tolist() == [106_050.0]
    work = 3.3e-7 * (400.0 + 106_050.0 - 1000.0)
    fluid = fs.solve_fluid(workload, PAPER)
    assert fluid.critical_rate == pytest.approx(50_000 / (0.01 * 106_050.0 + 50_000 * work), rel=1e-12)
    iteration = 0.01 / (1.0 - 4.0 * work)
    assert fluid.iteration_time == pytest.approx(iteration, rel=1e-12)
    assert fluid.resident_kv == pytest.approx(4.0 * 106_050.0 * iteration, rel=1e-12)
    assert fluid.batch_tokens == pytest.approx(4.0 * 500.0 * iteration, rel=1e-12)


def test_a_token_budget_sees_what_is_computed() -> None:
    """The tokens row alone binds: u = 1/c0 iterations of N tokens carry N/(c0 τ) requests, τ = 500, not 1100."""
    server = fs.Server(math.inf, fs.IterationTime.affine(0.01, 0.0, 0.0, 0.0), token_budget=50)
    assert fs.solve_fluid(chat(0.6), server).critical_rate == pytest.approx(50 / (0.01 * 500))
    assert fs.solve_fluid(chat(0.0), server).critical_rate == pytest.approx(50 / (0.01 * 1100))


@pytest.mark.parametrize("fraction", [0.5, 0.9999999])
def test_one_token_is_always_computed(fraction: float) -> None:
    """Of one token nothing is cached, and of a prompt cached but for its end the last token is computed."""
    workload = fs.Workload(
        [fs.RequestType(str(p), 1.0, p, 3, cached_prefix_fraction=fraction) for p in (1, 100)]
    )
    assert workload.mean_prefill_tokens.tolist() == [1.0, max(1.0, 100 * (1 - fraction))]


@settings(max_examples=40, deadline=None)
@given(workloads(rates=logarithmic(0.01, 100.0)), servers(), st.data())
def test_more_cached_never_lowers_the_value(workload: fs.Workload, server: fs.Server, data: Any) -> None:
    """Coefficients fall one by one, so value and critical rate rise; from 0 on."""
    less, more = sorted([data.draw(fractions), data.draw(fractions)])
    solved = [fs.solve_fluid(workload.with_cached_prefixes(f), server) for f in (0.0, less, more)]
    for before, after in itertools.pairwise(solved):
        assert after.objective_value >= before.objective_value * (1 - 1e-9)
        assert after.critical_rate >= before.critical_rate * (1 - 1e-9)
        assert after.certificate.ok


def test_nothing_cached_is_the_program_without() -> None:
    """At 0 the same numbers and file to the bit, and continuous there."""
    plain = fs.Workload([fs.RequestType("chat", 4.0, fs.lengths.lognormal(500, 1.0, maximum=4000), 101)])
    zero, tiny = plain.with_cached_prefixes(0), plain.with_cached_prefixes(1e-9)
    assert zero == plain
    assert zero.fingerprint == plain.fingerprint != tiny.fingerprint
    assert "cached_prefix_fraction" not in plain.to_json()
    assert plain.mean_prefill_tokens.tolist() == plain.mean_prompt_tokens.tolist()
    assert plain.prefill_attention.tolist() == (plain.moment(2, 0) / 2).tolist()
    values = [fs.solve_fluid(w, PAPER).critical_rate for w in (plain, zero, tiny)]
    assert values[0] == values[1]
    assert values[2] == pytest.approx(values[0], rel=1e-8)


def test_prefill_pools_do_the_remainder_and_decode_pools_all() -> None:
    """Separate machines: caching speeds up the prefill side only; in one pool the answer is the program's."""
    time = fs.IterationTime.affine(0.01, 1e-4, 1e-5, 1e-8, 1e-8)
    server = fs.Server(1_000_000, time)
    cached, plain = chat(0.6), chat(0.0)
    difference = busy_work(plain, time, "prefill") - busy_work(cached, time, "prefill")
    np.testing.assert_allclose(difference, 1e-4 * 600 + 1e-8 * 600**2 / 2)
    assert (busy_work(plain, time, "decode") == busy_work(cached, time, "decode")).all()
    heavy = chat(0.6, rate=1e3)
    one = solve_pools(heavy, [fs.Pool(server)]).objective_value
    assert one == pytest.approx(fs.solve_fluid(heavy, server).objective_value)
    apart = [fs.Pool(server, stage=stage, name=stage) for stage in ("prefill", "decode")]
    assert solve_pools(heavy, apart).objective_value > solve_pools(chat(0.0, 1e3), apart).objective_value


def test_region_and_fair_shares_follow() -> None:
    """Whatever is made from the coefficients agrees on the boundary of a workload with cached prefixes."""
    workload = chat(0.6)
    critical = fs.solve_fluid(workload, PAPER).critical_rate
    assert fs.stability_region(workload, PAPER).critical_rate([1.0]) == pytest.approx(critical)
    assert fs.fluid.solve_fair(workload.scaled(100.0), PAPER, alpha=1.0).admitted_rate[0] == pytest.approx(
        critical
    )
    at = fs.solve_fluid(workload.at_load(0.8, PAPER), PAPER)
    assert at.load.max() == pytest.approx(0.8)


def test_backlogs_and_fleets_follow() -> None:
    """0.25 s of a server each, 0.125 s with half of the prompt cached: 6 req/s wait or not, 60 need 15 or 8."""
    server = fs.Server(math.inf, fs.IterationTime.affine(1e-6, 2.5e-3, 0.0, 0.0))
    for fraction, backlog, replicas in ((0.0, 120.0, 15), (0.5, 0.0, 8)):
        workload = fs.Workload([fs.RequestType("chat", 59.9, 100, 1, cached_prefix_fraction=fraction)])
        transient = fs.solve_transient(workload, server, [6.0, 2.0], step=60.0)
        assert transient.backlog[1, 0] == pytest.approx(backlog, abs=1e-2)
        assert fs.plan_capacity(workload, [server], cost=[1.0]).replicas.tolist() == [replicas]


def test_files_and_changes_keep_the_fraction(tmp_path: Path) -> None:
    """JSON both ways, rates and loads changed, bins of one fraction joined; bins of several are not."""
    workload = fs.workloads.azure_conv().with_cached_prefixes(0.3)
    file = tmp_path / "workload.json"
    workload.to_json(file)
    assert fs.Workload.from_json(file) == workload
    for other in (
        workload.scaled(2.0),
        workload.with_rates(workload.arrival_rate),
        workload.at_load(0.5, PAPER),
        workload.merged(3),
        workload.merged(1),
    ):
        assert set(other.cached_prefix_fraction.tolist()) == {0.3}
    mixed = workload.with_cached_prefixes(np.linspace(0.0, 0.5, 12))
    with pytest.raises(InputError, match="of different cached_prefix_fraction"):
        mixed.merged(1)
    for shown in (workload, workload.types[0]):
        assert "0.3 of prompts cached" in repr(shown)
    solution = fs.solve_fluid(workload, PAPER)
    assert fs.FluidSolution.from_dict(solution.to_dict()).critical_rate == solution.critical_rate


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, math.nan, math.inf, "half", True])
def test_fractions_out_of_range_are_named(fraction: Any) -> None:
    """The error says which type; in files, where."""
    with pytest.raises(InputError, match="cached_prefix_fraction of type 'chat'"):
        fs.RequestType("chat", 1.0, 10, 10, cached_prefix_fraction=fraction)
    data = chat(0.5).to_dict()
    data["types"][0]["cached_prefix_fraction"] = fraction
    with pytest.raises(InputError, match=r"types\[0\]: cached_prefix_fraction"):
        fs.Workload.from_dict(data)


def test_one_fraction_per_type_or_one() -> None:
    """`with_cached_prefixes` names a wrong shape."""
    with pytest.raises(InputError, match="one per type"):
        chat(0.0).with_cached_prefixes([0.1, 0.2])


def test_a_cap_takes_the_reduced_work() -> None:
    """Memory, and so the cap, as without a cache; what it carries rises by the prompts not computed."""
    server = fs.Server(50_000, fs.IterationTime.affine(0.01, 1e-4, 1e-5, 1e-8), token_budget=100)
    tables = [fs.compile_policy(fs.solve_fluid(chat(f, 2.0), server), "capped") for f in (0.0, 0.6)]
    assert tables[0].max_in_service == tables[1].max_in_service
    carried = [table.certificate["carried"]["value"] for table in tables]
    for fraction, value in zip((0.0, 0.6), carried, strict=True):
        busy = 1e-4 * 1000 * (1 - fraction) + 1e-5 * 100 + 1e-8 * (106_050 - 1000)
        tau = 1000 * (1 - fraction) + 100
        cap = tables[0].max_in_service
        assert cap is not None
        slowest = max(busy + 0.01 * 101 / cap, busy + 0.01 * tau / 100)
        assert value == pytest.approx(1.0 / (2.0 * slowest))


def test_bounds_that_take_prompts_for_their_kv_say_so() -> None:
    """Where a source's formula has prompts cost what they hold, cached prefixes are named as the reason."""
    refused_bound, applies = (stability_conditions(w, PAPER)[0] for w in (chat(0.6), chat(0.0)))
    assert "cached" in str(refused_bound)
    assert "cached" not in str(applies)
